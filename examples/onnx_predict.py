"""Score images with a file of export.py; needs numpy, pillow and onnxruntime alone."""

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

IMAGE = re.compile(r"(?!(.*/)?([.@$]|__)).*\.(png|jpe?g|jfif|bmp|tiff?)", re.I)  # all that predict.py takes


def read_image(path: Path) -> np.ndarray:
    """(1, H, W, 3) uint8 RGB, upright: the high byte of 16 bits, transparency blended over black."""
    data = path.read_bytes()
    image: Image.Image = Image.open(path)
    cut = image.format == "JPEG" and data.endswith(b"\0") and not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if cut or (image.format != "MPO" and getattr(image, "n_frames", 1) > 1):
        raise ValueError("its end is missing" if cut else "it holds several pictures")
    image = ImageOps.exif_transpose(image)
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
    if args.output.exists():
        sys.exit(f"error: {args.output} is there already; choose another --output")
    onnxruntime.set_default_logger_severity(3)  # else it warns that `rate` is an input
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    about, rate = session.get_modelmeta().custom_metadata_map, args.false_alarm_rate
    if about.get("format_version") != "1" or len(session.get_inputs()[0].shape) != 4:
        sys.exit(f"error: {args.model} is no model of single images in format 1 of export.py")
    outputs = [output.name for output in session.get_outputs() if output.name != "anomaly_map"]
    if rate is not None and ("p_value" not in outputs or not 0 < rate < 1):
        sys.exit("error: --false-alarm-rate is between 0 and 1, for a model with held-out scores")
    given = {} if rate is None else {"rate": np.array(rate, np.float32)}
    root = args.images if args.images.is_dir() else args.images.parent
    below = [p for p in sorted(args.images.rglob("*")) if IMAGE.fullmatch(p.relative_to(root).as_posix())]
    rows = [["path", "category", "label", "defect", *outputs]]
    for path in below or [args.images]:
        try:
            found = session.run(outputs, {"image": read_image(path)} | given)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of what it cannot read
            sys.exit(f"error: {path}: {error}")
        shown = [f"{float(x[0]):.6g}" for x in found]
        rows.append([path.relative_to(root).as_posix(), about["category"], -1, "", *shown])
    with args.output.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
