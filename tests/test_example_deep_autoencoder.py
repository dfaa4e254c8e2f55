"""The example of deep autoencoders: its files, its messages, and its images."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "deep_autoencoder.py"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("deep_autoencoder")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def curves():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("curves")
    finally:
        sys.path.remove(str(EXAMPLES))


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny run on images of the user, in a file, without a terminal."""
    folder = tmp_path_factory.mktemp("run")
    images = np.random.default_rng(0).integers(0, 256, (330, 6, 5), dtype=np.uint8)
    np.savez(folder / "data.npz", x=images)
    out = folder / "deep" / "out"
    result = run_script(
        *("--data", folder / "data.npz", "--steps", 3, "--batch-size", 100, "--output-dir", out)
    )
    assert result.returncode == 0, result.stderr
    return result, out


class TestRun:
    def test_csv_holds_both_curves_up_to_the_last_step(self, finished):
        with (finished[1] / "curves.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0])[:5] == ["optimizer", "step", "seconds", "train_loss", "test_error"]
        last = {row["optimizer"]: row for row in rows}
        assert set(last) == {"K-FAC", "Adam"}
        assert all(row["step"] == "3" and float(row["seconds"]) > 0 for row in last.values())
        assert all(np.isfinite(float(row["test_error"])) for row in rows)
        assert float(last["K-FAC"]["damping"]) > 0

    def test_both_optimizers_start_from_the_same_weights(self, finished):
        with (finished[1] / "curves.csv").open() as file:
            starts = {row["test_error"] for row in csv.DictReader(file) if row["step"] == "0"}
        assert len(starts) == 1

    @pytest.mark.parametrize("name", ["error.png", "reconstructions.png"])
    def test_pictures_are_images(self, finished, name):
        from matplotlib import image

        picture = image.imread(finished[1] / name)
        assert picture.ndim == 3 and picture.std() > 0.01

    def test_output_reads_well_without_a_terminal(self, finished):
        output = finished[0].stdout
        assert "\x1b" not in output and "\r" not in output
        assert "after 3 steps" in output and "ahead" in output
        assert any("K-FAC" in line and "damping" in line for line in output.splitlines())


def test_training_sees_the_same_batches_with_both_optimizers(example, curves):
    images = curves.make_curves(300, seed=1, size=8).reshape(300, -1)
    losses = []
    for optimizer in ("sgd", example.make_kfac(example.SETUPS["curves"], seed=0)):
        recorder = example.Recorder("any", images[:10], max_seconds=100, max_steps=1)
        example.train(optimizer, example.Setup((20, 5)), images, recorder, batch_size=100, seed=3)
        losses.append(recorder.records[-1].train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_reconstruction_error_sums_over_pixels_and_averages_over_images(example):
    class Logits:
        def predict(self, images, **kwargs):
            return np.zeros_like(images)  # reconstructs 0.5

    images = np.stack([np.zeros(8), np.full(8, 0.5)]).astype("float32")
    assert example.reconstruction_error(Logits(), images) == pytest.approx(8 * 0.25 / 2)


def test_help_names_every_option(example, capsys):
    with pytest.raises(SystemExit) as exit_info:
        example.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    options = ["dataset", "data", "seconds", "steps", "batch-size", "learning-rate", "damping"]
    for option in [*options, "adam-learning-rate", "seed", "output-dir"]:
        assert f"--{option}" in text
    assert "default: 60.0" in text and "argparse" not in text and "==" not in text


def one_line_error(example, capsys, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        example.main([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    *usage, message = captured.err.splitlines()
    assert "error:" in message and not any("error:" in line for line in usage)
    return message


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--seconds", "-1"], "--seconds"),
            (["--seconds", "nan"], "--seconds"),
            (["--seconds", "soon"], "--seconds"),
            (["--steps", "0"], "--steps"),
            (["--batch-size", "1.5"], "--batch-size"),
            (["--damping", "-0.1"], "--damping"),
            (["--seed", "-1"], "--seed"),
            (["--seed", "99999999999"], "--seed"),
            (["--dataset", "cats"], "--dataset"),
            (["--train-images", "50", "--batch-size", "100"], "--batch-size 100"),
            (["--data", "/no/such/file.npz"], "/no/such/file.npz"),
            (["--train-images", "100", "--batch-size", "9", "--output-dir", "/dev/null/x"], "x"),
        ],
    )
    def test_argument(self, example, capsys, arguments, expected):
        assert expected in one_line_error(example, capsys, *arguments)

    @pytest.mark.parametrize(
        ("arrays", "expected"),
        [
            ({"images": np.zeros((300, 4))}, "x_train"),
            ({"x_train": np.zeros((300, 4))}, "x_test"),
            ({"x": np.zeros(300)}, "shape"),
            ({"x": np.float64(1)}, "shape"),
            ({"x": np.zeros((0, 4, 4))}, "shape"),
            ({"x": np.full((300, 4), np.nan)}, "finite"),
            ({"x": np.full((300, 4), 2.0)}, "[0, 1]"),
            ({"x": np.full((300, 4), "a")}, "dtype"),
            ({"x": np.array([[{}]] * 300)}, "read"),
            ({"x_train": np.zeros((300, 4)), "x_test": np.zeros((9, 5))}, "differ in shape"),
        ],
    )
    def test_data(self, example, capsys, tmp_path, arrays, expected):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        message = one_line_error(example, capsys, "--data", path, "--batch-size", "10")
        assert expected in message

    def test_data_of_another_format(self, example, capsys, tmp_path):
        for content in (b"", b"x,y\n1,2\n", b"PK\x03\x04 broken"):
            path = tmp_path / "data.npz"
            path.write_bytes(content)
            assert "data.npz" in one_line_error(example, capsys, "--data", path)
        np.save(tmp_path / "array.npy", np.zeros((300, 4)))
        assert "array.npy" in one_line_error(example, capsys, "--data", tmp_path / "array.npy")

    def test_mnist_that_cannot_be_downloaded(self, example, capsys, monkeypatch):
        def load_data():
            raise Exception("URL fetch failure on\nhttps://example.org")

        monkeypatch.setattr(example.keras.datasets.mnist, "load_data", load_data)
        message = one_line_error(example, capsys, "--dataset", "mnist")
        assert "cannot load MNIST: URL fetch failure on https" in message

    def test_script_exits_with_one_line(self):
        result = run_script("--seconds", "-3")
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stderr.splitlines()[-1].endswith("-3 is not a positive number")


@pytest.mark.slow
def test_mnist_from_keras_datasets(example, monkeypatch, tmp_path):
    """End to end but for the download: uint8 images with labels, as Keras returns them."""
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.zeros(40, np.uint8)
    load_data = lambda: ((images, labels), (images[:10], labels[:10]))  # noqa: E731
    monkeypatch.setattr(example.keras.datasets.mnist, "load_data", load_data)
    out = tmp_path / "out"
    example.main(
        ["--dataset", "mnist", "--steps", "2", "--batch-size", "20", "--output-dir", str(out)]
    )
    assert {path.suffix for path in out.iterdir()} == {".csv", ".png"}


class TestCurves:
    def test_same_seed_same_images(self, curves):
        first = curves.make_curves(30, seed=4)
        np.testing.assert_array_equal(first, curves.make_curves(30, seed=4))
        assert not np.array_equal(first, curves.make_curves(30, seed=5))

    @pytest.mark.parametrize("size", [16, 28])
    def test_shape_and_range(self, curves, size):
        images = curves.make_curves(50, seed=0, size=size)
        assert images.shape == (50, size, size) and images.dtype == np.float32
        assert images.min() >= 0 and images.max() <= 1

    def test_chunks_do_not_show(self, curves, monkeypatch):
        whole = curves.make_curves(25, seed=0)
        monkeypatch.setattr(curves, "CHUNK", 10)
        np.testing.assert_allclose(curves.make_curves(25, seed=0), whole, atol=1e-6)

    def test_ink_lies_along_the_curve(self, curves):
        points = curves.control_points(40, seed=2)
        images = curves.draw(points)
        t = np.linspace(0, 1, 201)[:, None]
        pixels = np.stack(np.meshgrid(np.arange(28) + 0.5, np.arange(28) + 0.5), axis=-1)
        for (start, middle, end), image in zip(points, images):
            curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
            away = np.linalg.norm(pixels[:, :, None] - curve, axis=-1).min(-1)
            assert image[away > 2.5].max() < 0.02
            length = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum()
            if length > 5:  # the ends are faint
                assert image[away < 0.4].mean() > 0.4

    def test_curves_are_connected(self, curves):
        for image in curves.make_curves(100, seed=3):
            assert components(image > 0.1) == 1


def components(inked):
    """Number of connected sets of pixels, diagonals included."""
    count, left = 0, set(map(tuple, np.argwhere(inked)))
    while left:
        count += 1
        stack = [left.pop()]
        while stack:
            row, column = stack.pop()
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
    return count
