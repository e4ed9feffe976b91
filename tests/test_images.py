"""Images: every source gives the same pixels; what a model cannot take is one clear line."""

import gzip
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from linearize.data import images
from linearize.data.images import Tower, image_processor, interpolates, read_images
from linearize.testing.pico import IMAGE_ENCODERS, pico, pico_config
from linearize.types import InputError, Unsupported

NAMES = ["ankle boot", "bag", "coat"]


def config(size=(8, 12), channels=3, patch=4, names=None, **more):
    own = {"image_size": size, "num_channels": channels, "patch_size": patch, **more}
    made = pico_config("vit", **own)
    if names is not None:
        made.id2label = dict(enumerate(names))
        made.label2id = {name: number for number, name in enumerate(names)}
        made.architectures = ["ViTForImageClassification"]
    return made


def arrays(count=6, size=(8, 12), channels=3, seed=0):
    shape = (count, *size, channels) if channels > 1 else (count, *size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(folder, pixels, names=None, suffix="png"):
    for number, image in enumerate(pixels):
        place = folder / names[number] if names else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:03}.{suffix}")
    return folder


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def png(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "png")
    return out.getvalue()


def chw(pixels):
    return torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else np.moveaxis(pixels, -1, 1).copy())


# --------------------------------------------------------------------------------------------------------- sources
def test_a_flat_folder_has_no_labels(tmp_path):
    pixels = arrays()
    data = read_images(save(tmp_path, pixels), config())
    assert torch.equal(data.pixels, chw(pixels)) and data.labels is None and set(data[0]) == {"pixel_values"}
    wanted = (torch.from_numpy(pixels[2]).permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(data[2]["pixel_values"], wanted, atol=1e-6, rtol=0)
    assert (data.grid, data.prefix, data.length, data.tokens) == ((2, 3), 1, 7, 42)
    assert "no image processor" in " ".join(data.notes)
    with pytest.raises(IndexError):
        data[6]


def test_class_folders_take_turns_and_are_matched_by_name(tmp_path):
    folders = ["Coat", "Coat", "Coat", "Ankle_boot", "Bag", "Bag"]
    save(tmp_path, arrays(), folders)
    data = read_images(tmp_path, config(names=NAMES))
    assert data.labels.tolist() == [0, 1, 2, 1, 2, 2]
    assert read_images(tmp_path, config(names=NAMES), limit=3).labels.tolist() == [0, 1, 2]
    plain = read_images(tmp_path, config(names=["LABEL_0", "LABEL_1", "LABEL_2"]))
    assert plain.labels.tolist() == [0, 1, 2, 1, 2, 2] and "Ankle_boot = 0" in " ".join(plain.notes)
    with pytest.raises(
        InputError, match=r"class 'Ankle_boot' is none of the model's 2 \(coat, bag.*label_column: none"
    ):
        read_images(tmp_path, config(names=["coat", "bag"]))
    assert read_images(tmp_path, config(names=["coat", "bag"]), label_column="none").labels is None


def test_splits_of_a_folder(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        save(tmp_path / part, arrays(count, seed=count), ["a", "b", "a"])
    assert len(read_images(tmp_path, config())) == 3
    assert len(read_images(tmp_path, config(), split="valid")) == 2
    assert read_images(tmp_path, config(), split="train[1:]").labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="no sub-folder for split 'test'"):
        read_images(tmp_path, config(), split="test")


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    grey = arrays(5, channels=1)
    for part, images_, labels in (("train", grey, [0, 1, 2, 0, 1]), ("t10k", grey[:2], [2, 1])):
        for kind, array in (("images-idx3", images_), ("labels-idx1", np.array(labels, dtype=np.uint8))):
            data = gzip.compress(idx(array)) if zipped else idx(array)
            (tmp_path / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}").write_bytes(data)
    one = config(channels=1, names=NAMES)
    train, test = read_images(tmp_path, one), read_images(tmp_path, one, split="test")
    assert torch.equal(train.pixels, chw(grey)) and train.labels.tolist() == [0, 1, 2, 0, 1]
    assert test.labels.tolist() == [2, 1] and torch.equal(test.pixels, train.pixels[:2])
    assert read_images(tmp_path, one, split="t10k[1:]").labels.tolist() == [1]
    file = next(tmp_path.glob("train-images*"))
    assert read_images(file, one).digest == train.digest != read_images(file, one, label_column="none").digest
    damaged = file.read_bytes()[:-7]
    file.write_bytes(damaged)
    with pytest.raises(InputError, match="download it again"):
        read_images(tmp_path, one)


def test_cifar_files(tmp_path):
    pixels = arrays(4, (32, 32))
    flat = np.moveaxis(pixels, -1, 1).reshape(4, -1)
    labels = np.arange(4, dtype=np.uint8)[:, None]
    for number in (1, 2):
        rows = slice(2 * number - 2, 2 * number)
        (tmp_path / f"data_batch_{number}.bin").write_bytes(np.hstack([labels, flat])[rows].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(np.hstack([labels, flat])[3:].tobytes())
    data = read_images(tmp_path, config((32, 32)))
    assert torch.equal(data.pixels, chw(pixels)) and data.labels.tolist() == [0, 1, 2, 3]
    assert read_images(tmp_path, config((32, 32)), split="test").labels.tolist() == [3]
    hundred = tmp_path / "hundred.bin"
    hundred.write_bytes(np.hstack([labels + 10, labels + 50, flat]).tobytes())
    assert read_images(hundred, config((32, 32))).labels.tolist() == [50, 51, 52, 53]
    assert read_images(hundred, config((32, 32)), label_column="coarse").labels.tolist() == [10, 11, 12, 13]
    hundred.write_bytes(b"12345")
    with pytest.raises(InputError, match="no CIFAR file"):
        read_images(hundred, config((32, 32)))


def test_npz_files(tmp_path):
    pixels, path = arrays(4), tmp_path / "a.npz"
    np.savez(path, x_train=pixels, y_train=np.array([[0], [1], [2], [0]]), x_test=pixels[:2], y_test=np.array([1, 1]))
    assert read_images(path, config()).labels.tolist() == [0, 1, 2, 0]
    assert read_images(path, config(), split="test").labels.tolist() == [1, 1]
    np.savez(path, a=np.moveaxis(pixels, -1, 1), b=pixels, year=np.arange(4))
    with pytest.raises(InputError, match="which array holds the images.*data.image_column; it has a, b, year"):
        read_images(path, config())
    assert torch.equal(read_images(path, config(), image_column="a").pixels, chw(pixels))
    with pytest.raises(InputError, match="no array 'yea'; did you mean 'year'"):
        read_images(path, config(), image_column="a", label_column="yea")
    np.savez(path, a=pixels / 255)
    with pytest.raises(InputError, match="images of float64, uint8 from 0 to 255 is needed"):
        read_images(path, config())
    np.savez(path, a=np.array([{"pickled": 1}, None], dtype=object))
    with pytest.raises(InputError, match="not a readable .npz of plain arrays"):
        read_images(path, config())


def test_tables_of_images(tmp_path, monkeypatch):
    import datasets

    pixels = arrays(4)
    rows = {"img": [{"bytes": png(p), "path": None} for p in pixels], "class": [2, 0, 1, 1]}
    features = datasets.Features(
        {"img": datasets.Image(), "class": datasets.ClassLabel(names=["Coat", "BAG", "ankle boot"])}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    for source in (tmp_path / "a.parquet", tmp_path, "me/shoes"):
        data = read_images(source, config(names=NAMES))
        assert torch.equal(data.pixels, chw(pixels)) and data.labels.tolist() == [0, 2, 1, 1]
    by_number = read_images("me/shoes", config(names=["x", "y", "z"]))
    assert by_number.labels.tolist() == [2, 0, 1, 1] and "taken by number" in " ".join(by_number.notes)
    with pytest.raises(InputError, match="no column 'image'; did you mean 'img'"):
        read_images(tmp_path / "a.parquet", config(), image_column="image")
    rows["img"][1]["bytes"] = b"nothing"
    table = datasets.Dataset.from_dict(rows, features=features)
    with pytest.raises(InputError, match=r"1 image \(me/shoes \[1\]\) cannot be read"):
        read_images("me/shoes", config())
    assert read_images("me/shoes", config(), skip_bad=True).labels.tolist() == [2, 1, 1]


# ------------------------------------------------------------------------------------------------------- processing
def test_the_models_own_processor_is_used(tmp_path):
    wide = {"height": 8, "width": 12}
    ViTImageProcessorPil(size=wide, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    processor = image_processor(tmp_path)
    save(tmp_path / "photos", [arrays(1, (20, 31))[0], arrays(1, (9, 50), seed=1)[0]])
    data = read_images(tmp_path / "photos", config(), processor=processor)
    assert data.pixels.shape == (2, 3, 8, 12) and data.pixels.dtype == torch.uint8 and not data.notes
    with Image.open(tmp_path / "photos" / "001.png") as image:
        wanted = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(data[1]["pixel_values"], wanted, atol=1e-5, rtol=0)
    assert image_processor(tmp_path / "photos") is None


def test_a_processor_that_does_more_is_refused(tmp_path):
    class Doubling(ViTImageProcessorPil):
        def normalize(self, image, mean, std, **more):
            return 2 * super().normalize(image, mean, std, **more)

    save(tmp_path, arrays(1))
    with pytest.raises(Unsupported, match="Doubling does more"):
        read_images(tmp_path, config(), processor=Doubling(size={"height": 8, "width": 12}))


def test_grey_becomes_colour_only_where_the_processor_says_so(tmp_path):
    save(tmp_path, arrays(2, channels=1))
    size = {"height": 8, "width": 12}
    with pytest.raises(InputError, match="000.png: 1 channel where the model takes 3; set do_convert_rgb: true"):
        read_images(tmp_path, config(), processor=ViTImageProcessorPil(size=size))
    data = read_images(tmp_path, config(), processor=ViTImageProcessorPil(size=size, do_convert_rgb=True))
    assert torch.equal(data.pixels[:, 0], data.pixels[:, 2])


def test_rotated_photos_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(arrays(1, (12, 8))[0])
    turned.save(tmp_path / "a.png", exif=exif)
    assert read_images(tmp_path, config()).size == (8, 12)


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("sizes", "channels", "model", "match"),
    [
        ([(8, 12), (12, 8)], 3, config(), r"mixed sizes, 8 x 12 \(000.png\) and 12 x 8 \(001.png\)"),
        ([(8, 12)], 1, config(), "1 channel where the model takes 3"),
        ([(8, 12)], 4, config(), "4 channels where the model takes 3"),
        ([(8, 12)], 3, config(channels=1), "3 channels where the model takes 1; convert"),
        ([(3, 12)], 3, config(), "3 x 12 pixels hold no whole patch"),
        ([(4, 7)], 3, config(), "hold one patch"),
        ([(9, 12)], 3, config(), "no whole number of 4 x 4 patches"),
        ([(4, 4)], 3, config((4, 4)), "hold one patch"),
    ],
)
def test_images_that_do_not_fit_are_one_clear_line(tmp_path, sizes, channels, model, match):
    save(tmp_path, [arrays(1, size, channels)[0] for size in sizes])
    with pytest.raises(InputError, match=match) as caught:
        read_images(tmp_path, model)
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_counted_and_named(tmp_path):
    save(tmp_path, arrays(4))
    for name in ("001.png", "003.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(InputError, match=r"2 images \(001.png, 003.png\) cannot be read .*--skip-bad") as caught:
        read_images(tmp_path, config())
    assert "\n" not in str(caught.value)
    data = read_images(tmp_path, config(), skip_bad=True)
    assert len(data) == 2 and "2 images (001.png, 003.png) could not be read and were left out" in data.notes
    for name in ("000.png", "002.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="no image in it that can be read"):
        read_images(tmp_path, config(), skip_bad=True)


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 12), 40000, dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="a.png: pixels of mode I;16, 8-bit ones"):
        read_images(tmp_path, config(channels=1))


def test_labels_outside_the_head(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=arrays(3), y=np.array([0, 1, 3]))
    with pytest.raises(InputError, match="label 3 is outside the model's head, whose 3 classes are 0 to 2"):
        read_images(path, config(names=NAMES))
    assert read_images(path, config()).labels.tolist() == [0, 1, 3]  # no head, nothing to be outside of


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda p: p / "nothing", "no such file or folder"),
        (lambda p: p, "no image in this folder"),
        (lambda p: write(p / "a.csv", b"x"), "not a source of images"),
        (lambda p: write(p / "a.parquet", b"PAR1"), "not a readable parquet file"),
        (lambda p: save(p, arrays(2), ["", "a"]), r"images beside class folders \(000.png\)"),
        (lambda p: save(p / "test", arrays(2)).parent, "no sub-folder of split 'train'; it has test"),
    ],
)
def test_bad_sources(tmp_path, make, match):
    with pytest.raises(InputError, match=match):
        read_images(make(tmp_path), config())


def write(path, data):
    path.write_bytes(data)
    return path


def test_a_model_of_text_takes_no_images(tmp_path):
    with pytest.raises(InputError, match="a bert model takes no images"):
        read_images(tmp_path, pico_config("bert"))


# ------------------------------------------------------------------------------------------------------------ laws
@pytest.mark.parametrize("family", list(IMAGE_ENCODERS))
def test_what_a_family_takes(family):
    """Positions are counted right at two sizes, and the model is told to interpolate where it must be."""
    model = pico(family)
    tower = Tower.of(model.config)
    assert not interpolates(model.config, (16, 16))
    for size in ((16, 16), (8, 20)):
        batch = {"pixel_values": torch.randn(2, 3, *size)}
        if interpolates(model.config, size):
            if family not in ("beit", "data2vec-vision"):  # no absolute positions in these tiny ones
                with pytest.raises((ValueError, RuntimeError)):
                    model(**batch)
            batch["interpolate_pos_encoding"] = torch.tensor(True)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        if family != "vit_mae":  # it drops most patches
            assert hidden.shape[1] == tower.prefix + tower.grid(size)[0] * tower.grid(size)[1]


def test_another_size_than_the_models_own(tmp_path):
    np.savez(tmp_path / "a.npz", x=arrays(3, (8, 20)))
    data = read_images(tmp_path / "a.npz", config((16, 16)))
    assert data.length == 11
    batch = data.collate([data[0], data[1]])
    with torch.no_grad():
        assert pico("vit")(**batch).last_hidden_state.shape == (2, 11, 32)
    with pytest.raises(InputError, match="8 x 20 pixels: this model takes 16 x 16 only"):
        one_size = AutoConfig.for_model("mlcd_vision_model", image_size=16, patch_size=4, num_channels=3)
        read_images(tmp_path / "a.npz", one_size)
    with pytest.raises(InputError, match="another image size"):
        data.check(config((8, 20)))


def test_views(tmp_path):
    np.savez(tmp_path / "a.npz", x=arrays(10), y=np.arange(10))
    data = read_images(tmp_path / "a.npz", config())
    train, valid = data.hold_out(15)
    assert [int(item["labels"]) for item in valid] == [0, 3, 6] and len(train) == 7
    assert train.take(2, 4)[0]["labels"] == 4 and train.pixels is data.pixels
    assert len({d.digest for d in (data, train, valid, data.take(1), data.take(0, 9))}) == 5
    assert data.take(0).digest == data.digest
    batch = data.collate([data[3], data[1]])
    assert batch["labels"].tolist() == [3, 1] and batch["pixel_values"].shape == (2, 3, 8, 12)
    with pytest.raises(InputError, match="too few to hold out"):
        data.hold_out(70)
    with pytest.raises(InputError, match="no images between"):
        data.take(10)


@pytest.mark.slow
def test_fashion_mnist_at_its_published_accuracy(assets):
    from linearize.evaluate.encoders import measure, table

    folder = assets / "vit-fashion-mnist"
    assert images.image_processor(folder) is None
    data = read_images(assets / "fashion-mnist", AutoConfig.from_pretrained(folder), split="test")
    assert len(data) == 10_000 and data.length == 50
    model = AutoModelForImageClassification.from_pretrained(folder)
    row = table(measure(model, data, [], batch=200))[0]
    assert row.figures["top1"] == pytest.approx(0.9077, abs=5e-5)
