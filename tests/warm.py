"""Importing this makes trainings cheap: what depends on nothing but its arguments is computed once.

Each training parses the same YAML files, asks timm for its networks' sizes, draws with Matplotlib, and
collects garbage among PyTorch's million objects. Processes that tests/processes.py copies share all of it.
"""

import gc
import io
import os
import pickle

import jinja2
import yaml
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure
from PIL import Image

from evaluation import report
from model import backbone
from utils.yaml_io import CONFIGS, read_yaml

_parse, _parsed = yaml.load, {}
_probe, _probed = backbone._size_options, {}
PLOTS = {name: getattr(report, name) for name in ("_curve", "_histogram")}


def load(text, Loader):
    """yaml.load, remembered: PyYAML takes 40 ms for a configuration."""
    key = text, Loader
    if key not in _parsed:
        _parsed[key] = pickle.dumps(_parse(text, Loader=Loader))
    return pickle.loads(_parsed[key])


def size_options(name, strides, size, options):
    """_size_options, remembered: timm builds a network for it."""
    key = name, strides, size, repr(sorted(options.items()))
    if key not in _probed:
        _probed[key] = _probe(name, strides, size, options)
    return _probed[key]


def sketch(*_, **__):
    """In place of a plot of report.html, of which a training draws three, each longer than a step takes."""
    return "data:image/svg+xml;base64,"


yaml.load, backbone._size_options = load, size_options
if "UNINET_SLOW_TESTS" not in os.environ:
    for name in PLOTS:
        setattr(report, name, sketch)
for path in CONFIGS.rglob("*.yaml"):
    read_yaml(path)
backbone.build_backbone("test_efficientnet", (4, 8, 16), image_size=(64, 64), random_weights=True)
figure = Figure()
figure.subplots().set_title("fonts are looked for once")
figure.savefig(io.BytesIO(), format="svg")
backend_agg.FigureCanvasAgg(figure).draw()
jinja2.Template("{{ x }}").render(x=1)
Image.init()
gc.collect()
gc.freeze()
