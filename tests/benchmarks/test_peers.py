"""The same encoders in transformers and open_clip."""

import json

import numpy as np
import peers
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", *map(str, range(20))]
SIZES = dict(
    num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32
)


@pytest.fixture
def encoders(tmp_path):
    """Folders of random encoders: a ViT-S for 98 pixels, and a tiny BERT."""
    torch.manual_seed(0)
    size = dict(hidden_size=384, num_attention_heads=6, patch_size=14)
    config = transformers.Dinov2Config(**size, image_size=98)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dinov2_small")
    text = tmp_path / "all_minilm_l6_v2"
    config = transformers.BertConfig(vocab_size=len(WORDS), **SIZES)
    transformers.BertModel(config).save_pretrained(text)
    (text / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(text / "vocab.txt")).save_pretrained(text)
    return tmp_path


def test_timm_gets_the_encoder_of_transformers(encoders):
    folder = encoders / "dinov2_small"
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    sizes = dict(img_size=98, num_classes=0, global_pool="token")
    ours = timm.create_model("vit_small_patch14_dinov2", **sizes).eval()
    weights = load_file(folder / "model.safetensors")
    ours.load_state_dict(peers.timm_weights(weights, 98))
    images = torch.rand(2, 3, 98, 98)
    with torch.no_grad():
        expected, found = theirs(images).pooler_output, ours(images)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_both_libraries_train_and_a_second_run_changes_nothing(
    encoders, run, write_tar_to, encode, monkeypatch
):
    for split, count in {"train": 8, "validation": 4}.items():
        files = []
        for number in range(count):
            image = encode(np.full((98, 98, 3), 20 * number, "uint8"))
            captions = json.dumps({"captions": [f"no {number}", f"{number}"]})
            files += [(f"{number}.jpg", image), (f"{number}.json", captions.encode())]
        write_tar_to(encoders / f"{split}-0.tar", files)
    monkeypatch.setattr(peers, "BATCH_SIZE", 4)
    names = ["transformers minutes=1", "open_clip minutes=1 tokens=40"]
    options = f"""--encoders={encoders} --data={encoders} --image-size=98
        --results={encoders}/results --dtype=float32 --runs""".split()
    run(peers, *options, *names, "--costs")
    costs = encoders / "results" / "costs.json"
    seconds = json.loads(costs.read_text())["seconds"]
    assert all(value > 0 for value in seconds.values())
    costs.write_text(json.dumps({"seconds": dict.fromkeys(seconds, 20)}))
    run(peers, *options, *names)
    results = encoders / "results" / "peers.json"
    found = json.loads(results.read_text())
    assert [row["steps"] for row in found["rows"]] == [3, 3]
    assert all(0 <= row["validation, mean recall@10"] <= 100 for row in found["rows"])
    monkeypatch.setattr(peers, "trained", None)
    run(peers, *options, *names)
    torch.backends.cuda.enable_flash_sdp(True)
    assert json.loads(results.read_text())["rows"] == found["rows"]
