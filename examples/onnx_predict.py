"""Score images with a file of export.py; needs numpy, pillow and onnxruntime alone."""

import argparse
import csv
import re
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

IMAGE = re.compile(r"(?!(.*/)?([.@$]|__)).*\.(png|jpe?g|jfif|bmp|tiff?)", re.I)  # all that predict.py takes


def read_image(path: Path) -> np.ndarray:
    """(1, H, W, 3) uint8 RGB, upright: the high byte of 16 bits, transparency blended over black."""
    data, opened = path.read_bytes(), Image.open(path)
    cut = opened.format == "JPEG" and data.endswith(b"\0") and not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if cut or min(opened.size) < 8 or (opened.format != "MPO" and getattr(opened, "n_frames", 1) > 1):
        raise ValueError("its end is missing" if cut else "several pictures, or a side below 8 pixels")
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"{image.mode} pixels have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        if not (image := image.convert("RGBA")).getchannel("A").getbbox():
            raise ValueError("it is transparent everywhere")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))[None]


def main(argv: list[str] | None = None) -> None:
    """Write one line per image, as predict.py does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("images", type=Path, help="a file or a folder")
    parser.add_argument("--output", type=Path, default=Path("scores.csv"))
    parser.add_argument("--false-alarm-rate", type=float, help="in place of the file's own")
    args = parser.parse_args(argv)
    if (there := args.output.exists()) or not args.output.absolute().parent.is_dir():
        reason = "is there already" if there else "has no folder"
        raise SystemExit(f"error: {args.output} {reason}; choose another --output")
    onnxruntime.set_default_logger_severity(3)  # else it warns that `rate` is an input
    try:
        session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds, which share no other class
        raise SystemExit(f"error: {args.model} is no file of export.py that opens: {error}") from error
    about, rate = session.get_modelmeta().custom_metadata_map, args.false_alarm_rate
    if about.get("format_version") != "1" or len(session.get_inputs()[0].shape) != 4:
        raise SystemExit(f"error: {args.model} is no model of single images in format 1 of export.py")
    outputs = [output.name for output in session.get_outputs() if output.name != "anomaly_map"]
    if rate is not None and ("p_value" not in outputs or not 0 < rate < 1):
        raise SystemExit("error: --false-alarm-rate is between 0 and 1, for a model with held-out scores")
    given = {} if rate is None else {"rate": np.array(rate, np.float32)}
    named = ((path, path.relative_to(args.images).as_posix()) for path in sorted(args.images.rglob("*")))
    below = [pair for pair in named if IMAGE.fullmatch(pair[1])]
    rows = [["path", "category", "label", "defect", *outputs]]
    for path, name in below or [(args.images, args.images.name)]:
        try:
            found = session.run(outputs, {"image": read_image(path)} | given)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
            raise SystemExit(f"error: {path}: {error}") from error
        rows.append([name, about["category"], -1, "", *(f"{float(x[0]):.6g}" for x in found)])
    with args.output.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
