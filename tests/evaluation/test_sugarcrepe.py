import itertools
import json

import numpy as np
import pytest
import torch
from clip_benchmark.datasets.sugar_crepe import SugarCrepe
from clip_benchmark.metrics import image_caption_selection

from keras_cluster_mask.data.images import NUM_DRAWS, Cutter
from keras_cluster_mask.evaluation import (
    caption_selection_accuracy,
    embed,
    embed_texts,
    evaluate_sugarcrepe,
)
from keras_cluster_mask.evaluation.embedding import Embedder
from keras_cluster_mask.interop.clip_benchmark import adapt

SPLITS = {
    "add_att": 5,
    "add_obj": 9,
    "replace_att": 6,
    "replace_obj": 8,
    "replace_rel": 7,
    "swap_att": 6,
    "swap_obj": 4,
}
PICTURES = [f"{index:012}.jpg" for index in range(8, 19)]


@pytest.fixture
def folders(tmp_path, encode):
    """SugarCrepe's annotations, and pictures of noise, each of another size."""
    rng = np.random.default_rng(0)
    annotations, pictures = tmp_path / "data", tmp_path / "val2017"
    annotations.mkdir()
    pictures.mkdir()
    for index, name in enumerate(PICTURES):
        pixels = rng.integers(0, 256, (20 + index, 31 - index, 3), "uint8")
        (pictures / name).write_bytes(encode(pixels, "JPEG"))
    # Whatever else is in the folder is not read.
    (pictures / "000000000001.jpg").write_bytes(b"no picture")
    # Of three letters, which the model reads, in an order of their own.
    texts = ["".join(letters) for letters in itertools.product("aegkot", repeat=3)]
    for split, count in SPLITS.items():
        # Captions and pictures occur in several splits; indices have gaps.
        drawn = [rng.choice(texts, 2, replace=False) for _ in range(count)]
        entries = {
            str(3 * index): {
                "filename": str(rng.choice(PICTURES)),
                "caption": str(caption),
                "negative_caption": str(negative),
            }
            for index, (caption, negative) in enumerate(drawn)
        }
        (annotations / f"{split}.json").write_text(json.dumps(entries))
    return annotations, pictures


def entries_of(annotations, split):
    return json.loads((annotations / f"{split}.json").read_text()).values()


def change(annotations, split, index, **fields):
    path = annotations / f"{split}.json"
    entries = json.loads(path.read_text())
    entries[index] = {**entries[index], **fields}
    path.write_text(json.dumps(entries))


def random_embeddings(count, width=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# === Figures ===


def margins_by_numpy(model, tokenizer, folders):
    """For each split how much more similar the captions are than the wrong ones."""
    annotations, pictures = folders
    cut = Cutter((16, 16), training=False)
    entries = [x for split in SPLITS for x in entries_of(annotations, split)]
    images = [
        cut((pictures / entry["filename"]).read_bytes(), np.zeros(NUM_DRAWS))
        for entry in entries
    ]
    texts = [entry[x] for x in ("caption", "negative_caption") for entry in entries]
    images = embed(model, np.stack(images), verbose=0)["image_embeddings"]
    texts = embed_texts(model, texts, tokenizer, verbose=0)
    right, wrong = (np.sum(images * each, axis=1) for each in np.split(texts, 2))
    ends = np.cumsum([*SPLITS.values()])
    return dict(zip(SPLITS, np.split(right - wrong, ends[:-1])))


def test_accuracies_and_means_equal_numpys(model, tokenizer, folders):
    found = evaluate_sugarcrepe(model, *folders, tokenizer, verbose=0)
    margins = margins_by_numpy(model, tokenizer, folders)
    # So that rounding decides nothing.
    assert min(np.abs(each).min() for each in margins.values()) > 1e-5
    expected = {split: np.mean(each > 0) for split, each in margins.items()}
    assert any(0 < value < 1 for value in expected.values())
    expected |= {
        "add": (expected["add_att"] + expected["add_obj"]) / 2,
        "replace": sum(expected[f"replace_{x}"] for x in ("att", "obj", "rel")) / 3,
        "swap": (expected["swap_att"] + expected["swap_obj"]) / 2,
        "mean": sum(expected.values()) / 7,
    }
    assert found["accuracy"] == pytest.approx(expected)
    assert found["count"] == SPLITS
    assert found["chance"] == 0.5


def test_accuracies_equal_clip_benchmarks(model, tokenizer, folders):
    annotations, pictures = folders
    adapter, transform, tokenize = adapt(
        model, lambda texts: tokenizer([text.encode() for text in texts])
    )
    found = evaluate_sugarcrepe(model, *folders, tokenizer, verbose=0)["accuracy"]
    for split in SPLITS:
        dataset = SugarCrepe(pictures, annotations / f"{split}.json", transform)
        batches = [
            (torch.stack([image for image, _ in rows]), [texts for _, texts in rows])
            for rows in ([dataset[i] for i in range(len(dataset))],)
        ]
        theirs = image_caption_selection.evaluate(
            adapter, batches, tokenize, "cpu", amp=False
        )
        assert found[split] == pytest.approx(theirs["text_acc"], abs=1e-6)


def test_some_splits_give_the_means_of_those_that_are_whole(model, tokenizer, folders):
    whole = evaluate_sugarcrepe(model, *folders, tokenizer, verbose=0)["accuracy"]
    splits = ["swap_att", "add_obj", "swap_obj"]
    for split in SPLITS.keys() - {*splits}:
        (folders[0] / f"{split}.json").unlink()
    folders = [f"{folder}/" for folder in folders]
    found = evaluate_sugarcrepe(
        model.backbone, *folders, tokenizer, 16, splits, batch_size=3, verbose=0
    )
    assert found["accuracy"] == pytest.approx(
        {name: whole[name] for name in (*splits, "swap")}
    )
    assert found["count"] == {split: SPLITS[split] for split in splits}


def test_each_picture_and_each_text_is_embedded_once(
    model, tokenizer, folders, monkeypatch, capsys
):
    rows = {"images": 0, "texts": 0}

    def counted(name, embedded):
        def count(self, inputs):
            rows[name] += len(inputs)
            return embedded(self, inputs)

        return count

    for name in rows:
        monkeypatch.setattr(Embedder, name, counted(name, getattr(Embedder, name)))
    evaluate_sugarcrepe(model, *folders, tokenizer, batch_size=4)
    entries = [x for split in SPLITS for x in entries_of(folders[0], split)]
    pictures = {entry["filename"] for entry in entries}
    texts = {entry[x] for entry in entries for x in ("caption", "negative_caption")}
    assert rows == {"images": len(pictures), "texts": len(texts)}
    assert len(pictures) < len(entries)
    assert len(texts) < 2 * len(entries)
    printed = capsys.readouterr().out
    for names in (pictures, texts):
        assert f"{len(names)}/{len(names)}" in printed
    evaluate_sugarcrepe(model, *folders, tokenizer, verbose=0)
    assert capsys.readouterr().out == ""


def test_embeddings_are_compared_row_by_row():
    images, captions, negatives = (random_embeddings(50, seed=i) for i in range(3))
    expected = [
        image @ caption > image @ negative
        for image, caption, negative in zip(images, captions, negatives)
    ]
    found = caption_selection_accuracy(images, captions, negatives)
    assert found == pytest.approx(np.mean(expected))
    swapped = caption_selection_accuracy(images, negatives, captions)
    assert swapped == pytest.approx(1 - found)


def test_captions_that_are_embedded_alike_do_not_win():
    images, captions = random_embeddings(50), random_embeddings(50, seed=1)
    assert caption_selection_accuracy(images, captions, captions) == 0
    # As the order of a sum makes them differ.
    rounded = captions.astype("float32") * np.float32(1 - 2**-24)
    assert caption_selection_accuracy(images, captions, rounded) == 0
    assert caption_selection_accuracy(images, rounded, captions) == 0


# === Bad input ===


def test_embeddings_that_do_not_fit_are_errors():
    x = random_embeddings(4)
    bad = np.where(np.arange(4)[:, None] == 2, np.nan, x)
    with pytest.raises(ValueError, match=r"one shape.*negative_.*\(3, 8\)"):
        caption_selection_accuracy(x, x, x[:3])
    with pytest.raises(ValueError, match=r"`caption_embeddings`.*1 rows.*\[2\]"):
        caption_selection_accuracy(x, bad, x)


def test_missing_splits_are_named(model, tokenizer, folders, tmp_path):
    (folders[0] / "swap_att.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"`annotations`.*/data/swap_att\.json$"
    ):
        evaluate_sugarcrepe(model, *folders, tokenizer)
    with pytest.raises(FileNotFoundError, match=r"add_att\.json, .*swap_obj\.json"):
        evaluate_sugarcrepe(model, tmp_path, folders[1], tokenizer)
    for splits in (["add"], []):
        with pytest.raises(ValueError, match=r"`splits`.*add_att.*Received: splits="):
            evaluate_sugarcrepe(model, *folders, tokenizer, splits=splits)


@pytest.mark.parametrize("field", ["filename", "caption", "negative_caption"])
@pytest.mark.parametrize("value", [None, " ", 3])
def test_an_entry_without_a_field_is_named(model, tokenizer, folders, field, value):
    change(folders[0], "add_obj", "6", **{field: value})
    with pytest.raises(ValueError, match=rf"add_obj\.json.*'6' without {field}$"):
        evaluate_sugarcrepe(model, *folders, tokenizer)


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"0": ["a.jpg"]}'])
def test_files_of_another_kind_are_errors(model, tokenizer, folders, content):
    (folders[0] / "swap_obj.json").write_text(content)
    with pytest.raises(ValueError, match=r"`annotations`.*Received: .*swap_obj\.json"):
        evaluate_sugarcrepe(model, *folders, tokenizer)


def test_missing_pictures_are_counted_and_the_first_are_named(
    model, tokenizer, folders, tmp_path
):
    for index in ("0", "3", "6", "9", "12", "15", "18"):
        change(folders[0], "replace_rel", index, filename=f"lost{index}.jpg")
    match = r"without 7 of them, the first lost0.jpg, lost12.jpg, .*, lost3.jpg$"
    with pytest.raises(FileNotFoundError, match=match):
        evaluate_sugarcrepe(model, *folders, tokenizer)
    empty = tmp_path / "empty"
    with pytest.raises(FileNotFoundError, match=r"`pictures`.*Received: .*/empty$"):
        evaluate_sugarcrepe(model, folders[0], empty, tokenizer)
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"`pictures`.*/empty without 1\d of"):
        evaluate_sugarcrepe(model, folders[0], empty, tokenizer)


def test_a_picture_that_does_not_decode_is_named(model, tokenizer, folders):
    change(folders[0], "add_att", "3", filename="000000000001.jpg")
    with pytest.raises(ValueError, match=r"000000000001\.jpg.*does not decode"):
        evaluate_sugarcrepe(model, *folders, tokenizer, verbose=0)
