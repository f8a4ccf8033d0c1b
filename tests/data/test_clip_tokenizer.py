import copy
import gzip
import pickle

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from keras_cluster_mask.data import (
    CLIPTokenizer,
    clip_tokenizer,
    example_images,
    read_captions,
)
from tests.data.reading import LETTERS, keras_hub_tokenizer, mixed_captions

open_clip_tokenizer = pytest.importorskip("open_clip.tokenizer")

pytestmark = pytest.mark.any_backend

IMAGES = example_images()
SPECIALS = clip_tokenizer.START, clip_tokenizer.END
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
    "<\u017ftart_of_text> <\ufb05art_of_text> <end_of_text><\u017ftart_of_text>",
    "a line\nand\tanother\r\n",
]


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_open_clip()


@pytest.fixture(scope="module")
def trained():
    return CLIPTokenizer.train(["a red fox", "two red foxes"] * 5, 540, 12)


@pytest.mark.parametrize(("context_length", "count"), [(77, 3000), (8, 0)])
def test_ids_equal_open_clips(context_length, count):
    tokenizer = CLIPTokenizer.from_open_clip(context_length)
    assert tokenizer.vocabulary_size == 49408
    reference = open_clip_tokenizer.SimpleTokenizer(context_length=context_length)
    captions = [*CAPTIONS, *read_captions(IMAGES / "test-*.tar")]
    captions += mixed_captions(count, seed=0)
    for first in range(0, len(captions), 50):
        several = captions[first : first + 50]
        for caption, *rows in zip(several, tokenizer(several), reference(several)):
            np.testing.assert_array_equal(*rows, err_msg=ascii(caption))


@pytest.mark.parametrize("frame", ["a{}a", "1{}!{}!", "'{}e {}{}"])
def test_words_are_open_clips_for_every_code_point(frame):
    pattern = open_clip_tokenizer.SimpleTokenizer().pat
    words = Regex(clip_tokenizer.WORD_PATTERN)
    split = pre_tokenizers.Split(words, "removed", invert=True)
    # A caption is lower-case when it is cut into words.
    texts = [frame.replace("{}", letter.lower()) for letter in LETTERS]
    for start in range(0, len(texts), 1000):
        text = " ".join(texts[start : start + 1000])
        actual = [word for word, _ in split.pre_tokenize_str(text)]
        assert actual == pattern.findall(text), f"from {LETTERS[start]!a} on"


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
    tower = {"num_layers": 1, "num_heads": 1, "hidden_dim": 2, "intermediate_dim": 2}
    keras_hub.models.CLIPBackbone(
        keras_hub.models.CLIPVisionEncoder(4, image_shape=(8, 8, 3), **tower),
        keras_hub.models.CLIPTextEncoder(49408, 2, **tower),
        projection_dim=2,
    ).save_to_preset(tmp_path / "clip")
    keras_hub_tokenizer(clip, tmp_path).save_to_preset(tmp_path / "clip")
    theirs, ours = tmp_path / "clip/assets", tmp_path / "ours/assets"
    clip.save_to_preset(tmp_path / "ours")
    for name in ("tokenizer/vocabulary.json", "tokenizer/merges.txt"):
        read = [(assets / name).read_text().strip() for assets in (ours, theirs)]
        assert read[0] == read[1]
    preset = CLIPTokenizer.from_preset(str(tmp_path / "clip"))
    np.testing.assert_array_equal(preset(CAPTIONS), clip(CAPTIONS))


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


def test_training_on_the_same_captions_gives_the_same_vocabulary():
    # Many ties between pairs, which the random order of a hash table could break.
    letters = np.random.default_rng(0).choice(list("abcdefghijé"), (300, 6, 4))
    captions = [" ".join("".join(word) for word in words) for words in letters]
    trained = [CLIPTokenizer.train(captions, 900) for _ in range(5)]
    assert {tokenizer.vocabulary_size for tokenizer in trained} == {900}
    assert len({tokenizer(captions).tobytes() for tokenizer in trained}) == 1


@pytest.mark.parametrize("which", ["clip", "trained"])
def test_saving_pickling_and_copying_keep_everything(
    which, request, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer = request.getfixturevalue(which)
    tokenizer.save("~/tokenizer.json")
    loaded = CLIPTokenizer.from_file("~/tokenizer.json")
    copies = [loaded, pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)]
    for other in copies:
        assert other.context_length == tokenizer.context_length
        assert other.vocabulary_size == tokenizer.vocabulary_size
        np.testing.assert_array_equal(other(CAPTIONS), tokenizer(CAPTIONS))
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    shorter = CLIPTokenizer.from_file(tmp_path / "tokenizer.json", np.int64(4))
    whole, cut = tokenizer("red fox red"), shorter("red fox red")
    np.testing.assert_array_equal(cut[:, :3], whole[:, :3])
    assert cut[:, 3:] == [tokenizer.end_token_id]


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"vocabulary": ["a',
        b"first\nsecond line has words",
        b"\xff\xfe\xfd",
        gzip.compress(b"first\na b\n", mtime=0)[:-12],
        gzip.compress(b"first\na b\n", mtime=0)[:12] + b"\xff" * 12,
        b'{"vocabulary": [], "merges": []}',
        b'{"vocabulary": ["a", "<end_of_text>"], "merges": []}',
    ],
)
def test_another_file_is_refused_by_name(content, tmp_path):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match=r"`path`.*Received: .*other"):
        CLIPTokenizer.from_file(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("vocabulary_size", lambda: CLIPTokenizer.train(["a"], vocabulary_size=513)),
        ("captions", lambda: CLIPTokenizer.train("a cat")),
        ("context_length", lambda: CLIPTokenizer.train(["a"], context_length=2)),
        ("context_length", lambda: CLIPTokenizer.train(["a"]).with_context_length(2)),
        ("vocabulary", lambda: CLIPTokenizer([*SPECIALS[::-1]], [])),
        ("vocabulary", lambda: CLIPTokenizer(["a", "a", *SPECIALS], [], 9)),
    ],
)
def test_wrong_arguments_are_named(name, make):
    with pytest.raises((ValueError, TypeError), match=rf"`{name}`.*Received: "):
        make()
