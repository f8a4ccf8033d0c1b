import copy
import gzip
import json
import pickle
import unicodedata

import numpy as np
import pytest

from keras_cluster_mask.data import CLIPTokenizer

open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")

CAPTIONS = [
    "",
    " \t\n ",
    "A photo of a CAT.",
    "it's they're we've I'm she'll he'd don't 'S 'T rock'n'roll",
    "12345 3.14159 ½ ² ١٢٣ iPhone15 4x4",
    "Tom &amp; Jerry &lt;3 &amp;lt;b&amp;gt; &#39;quoted&#39; &eacute;",
    "schÃ¶n l&#39;Ã©tÃ© â€œquotesâ€\x9d FranÃ§ais",
    "naïve café ŒUVRE ﬁne straße İstanbul",
    "日本語の写真 中文 한국어 العربية हिन्दी ไทย",
    "😀 👍🏽 👨‍👩‍👧 🇩🇪 ❤️",
    "\u2018curly\u2019 \u201cquotes\u201d \u2014 dash\u2026",
    "!!! ... --- ### @user #tag http://example.com/a?b=c&d=e",
    "under_score CamelCase kebab-case a/b\\c",
    "\x00\x07a\x1c\x85b\u200bc\u180ed\u2003e\u3000f\r\ng",
    "word " * 200,
    "x" * 3000,
    "long s: '\u017f, an accent on nothing: \u0345 a\u0345b",
    "<start_of_text> is <END_OF_TEXT> a token",
    "not one: !<start_of_text>, and one within: a<end_of_text>b",
    "&lt;end_of_text&gt;",
]


def random_captions(count, seed=0):
    rng = np.random.default_rng(seed)
    blocks = [(0x20, 0x7F), (0x20, 0x7F), (0, 0x250), (0x370, 0x530), (0x2000, 0x2100)]
    blocks += [(0x3000, 0x3100), (0x4E00, 0x5000), (0x1F300, 0x1F6FF)]
    for _ in range(count):
        caption = ""
        for _ in range(rng.integers(1, 8)):
            first, last = blocks[rng.integers(len(blocks))]
            caption += "".join(map(chr, rng.integers(first, last, rng.integers(1, 6))))
            caption += ["", " ", "'s ", "&amp;"][rng.integers(4)]
        # Code points that a Unicode version does not know are letters in another.
        yield "".join(c for c in caption if unicodedata.category(c) != "Cn")


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_open_clip()


@pytest.fixture(scope="module")
def trained():
    return CLIPTokenizer.train(["a red fox", "two red foxes"] * 5, 540, 12)


def test_ids_equal_open_clips_on_tricky_captions(clip):
    reference = open_clip_tokenizer.SimpleTokenizer()
    captions = CAPTIONS + list(random_captions(600))
    expected = reference(captions).numpy()
    actual = clip(captions)
    for caption, row, expected_row in zip(captions, actual, expected):
        np.testing.assert_array_equal(row, expected_row, err_msg=ascii(caption))


@pytest.mark.parametrize("context_length", [8, 32])
def test_a_long_caption_is_cut_like_open_clips_and_ends_with_the_end(context_length):
    reference = open_clip_tokenizer.SimpleTokenizer(context_length=context_length)
    ids = CLIPTokenizer.from_open_clip(context_length)(["many words " * 30, "few"])
    np.testing.assert_array_equal(ids, reference(["many words " * 30, "few"]))
    assert ids[0, -1] == 49407


def test_the_size_and_the_specials_are_clips(clip):
    assert clip.vocabulary_size == 49408
    assert (clip.start_token_id, clip.end_token_id) == (49406, 49407)
    assert clip("a cat").shape == (1, 77)
    assert clip("a cat").dtype == np.int32


def test_bytes_arrays_and_str_mean_the_same(clip):
    expected = clip(["café", "dog"])
    np.testing.assert_array_equal(clip(["café".encode(), b"dog"]), expected)
    array = np.array(["café".encode(), b"dog"], dtype=object)
    np.testing.assert_array_equal(clip(array), expected)
    assert clip(b"caf\xff").shape == (1, 77)
    assert clip([]).shape == (0, 77)


def test_a_missing_open_clip_is_explained(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        CLIPTokenizer.from_open_clip()


def test_a_keras_hub_preset_gives_the_same_ids(clip, tmp_path):
    keras_hub = pytest.importorskip("keras_hub")
    config = clip._config()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(t, t): i for i, t in enumerate(config["vocabulary"])}
    merges = [" ".join(merge) for merge in config["merges"]]
    tower = {"num_layers": 1, "num_heads": 1, "hidden_dim": 2, "intermediate_dim": 2}
    keras_hub.models.CLIPBackbone(
        keras_hub.models.CLIPVisionEncoder(4, image_shape=(8, 8, 3), **tower),
        keras_hub.models.CLIPTextEncoder(49408, 2, **tower),
        projection_dim=2,
    ).save_to_preset(tmp_path / "clip")
    keras_hub.models.CLIPTokenizer(vocabulary, merges).save_to_preset(tmp_path / "clip")
    preset = CLIPTokenizer.from_preset(str(tmp_path / "clip"))
    captions = [caption for caption in CAPTIONS if "_of_text" not in caption.lower()]
    np.testing.assert_array_equal(preset(captions), clip(captions))
    assert preset("<|endoftext|>")[0, 1] == preset.end_token_id


def test_decoding_gives_the_words_back(clip):
    text = "hello , wörld ! it 's 4 2 日本 😀"
    assert clip.decode(clip("Hello, wörld! It's 42 日本 😀")[0]) == text
    assert clip.decode(clip(["a cat", ""])) == ["a cat", ""]
    assert clip.decode([320, 2368]) == "a cat"


def test_training_merges_frequent_words_into_single_tokens(trained):
    ids = trained("red foxes")[0]
    assert ids[0] == trained.start_token_id == trained.vocabulary_size - 2
    assert np.argmax(ids) == list(ids).index(trained.end_token_id) == 3
    assert trained.decode(ids) == "red foxes"
    assert trained.vocabulary_size <= 540
    # Letters that were never seen are spelt out of bytes.
    assert trained.decode(trained("Zebra é")) == ["zebra é"]


def test_training_keeps_to_the_vocabulary_size():
    captions = list(random_captions(200))
    assert CLIPTokenizer.train(captions, 700).vocabulary_size == 700


def test_training_on_the_same_captions_gives_the_same_vocabulary():
    # Many ties between pairs, which the random order of a hash table could break.
    letters = np.random.default_rng(0).choice(list("abcdefghijé"), (300, 6, 4))
    captions = [" ".join("".join(word) for word in words) for words in letters]
    merges = {
        tuple(CLIPTokenizer.train(captions, 900)._config()["merges"]) for _ in range(5)
    }
    assert len(merges) == 1
    assert len(merges.pop()) == 900 - 514


@pytest.mark.parametrize("which", ["clip", "trained"])
def test_saving_pickling_and_copying_keep_everything(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = CLIPTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    copies = [loaded, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)]
    for other in copies:
        assert other.context_length == tokenizer.context_length
        assert other.vocabulary_size == tokenizer.vocabulary_size
        np.testing.assert_array_equal(other(CAPTIONS), tokenizer(CAPTIONS))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    shorter = CLIPTokenizer.from_file(tmp_path / "tokenizer.json", context_length=5)
    assert shorter("red").shape == (1, 5)


def test_a_save_that_fails_leaves_the_old_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"format": "keras_cl',
        json.dumps({"model": {"type": "BPE"}}).encode(),
        b"",
        b"first\nsecond line has words",
        b"\xff\xfe\xfd",
        gzip.compress(b"first\na b\n", mtime=0)[:-12],
    ],
)
def test_another_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"`path`.*Received: .*other"):
        CLIPTokenizer.from_file(tmp_path / "other")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"`vocabulary_size`.*Received: 513"):
        CLIPTokenizer.train(["a"], vocabulary_size=513)
    with pytest.raises(ValueError, match=r"`captions`.*Received: 'a cat'"):
        CLIPTokenizer.train("a cat")
    with pytest.raises(ValueError, match=r"`context_length`.*Received: 2"):
        CLIPTokenizer.train(["a"], context_length=2)
    with pytest.raises(TypeError, match=r"`texts`.*Received: 3"):
        CLIPTokenizer.train(["a"])(["a", 3])
    with pytest.raises(ValueError, match=r"`vocabulary` must hold"):
        CLIPTokenizer(["<end_of_text>", "<start_of_text>"], [])
