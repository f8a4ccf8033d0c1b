"""Whether a tokenizer suits a text tower, in `fit` and in evaluation."""

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.evaluation import (
    embed,
    embed_texts,
)
from keras_cluster_mask.training.model_tokenizer import (
    check_matching_tokenizer,
    identity_of,
)
from tests.data.reading import keras_hub_tokenizer
from tests.helpers import (
    CONTEXT,
    FAST,
    VOCABULARY,
    image_mlp,
    random_pairs,
    stream,
    text_bag,
    tiny_clip,
    tiny_metaclip,
)

pytestmark = pytest.mark.any_backend

START, END = VOCABULARY - 2, VOCABULARY - 1
# The end token that a MetaCLIP 2 backbone pools at.
METACLIP_END = 2


def make_tokenizer(start=(START,), end=END, length=CONTEXT, padding=0):
    """Letters between special tokens, filled up; `None` leaves a special token out."""

    def tokenizer(texts):
        ends = [] if end is None else [end]
        rows = []
        for text in texts:
            letters = [1 + byte % (START - 1) for byte in text.encode()]
            row = [*start, *letters[: length - len(start) - len(ends)], *ends]
            rows.append(row + [padding] * (length - len(row)))
        return rows

    return tokenizer


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def shard(tmp_path_factory, write_pairs_to):
    return write_pairs_to(tmp_path_factory.mktemp("shards") / "a.tar", 0, 8)


def embed_cat(model, tokenizer):
    return embed_texts(model, ["a cat"], tokenizer, verbose=0)


SPECIAL_TOKENS = r"`tokenizer` must .*highest id.*CLIPPreprocessor.*Received: "


@pytest.mark.parametrize(
    "template",
    ["$A", "$A </s>", "<s> $A", "<s> </s> $A", "</s> $A <s>"],
)
def test_a_clip_tower_needs_a_start_and_an_end_of_the_highest_id(clip, template):
    tokenizer = hugging_face(END, template)
    with pytest.raises(ValueError, match=SPECIAL_TOKENS):
        check_matching_tokenizer(clip, tokenizer)
    with pytest.raises(ValueError, match=SPECIAL_TOKENS):
        check_matching_tokenizer(clip, hugging_face(end=2))
    check_matching_tokenizer(clip, hugging_face(END))
    # Other towers do not.
    check_matching_tokenizer(kcm.ContrastiveModel(image_mlp(), text_bag()), tokenizer)


def test_a_tokenizer_is_checked_wherever_it_is_used(clip, shard):
    bad, captions = hugging_face(2, model_max_length=CONTEXT), ["a cat", "no dog"]
    captioned = {"images": random_pairs(2)["images"], "captions": captions}
    data = stream(shard, bad, training=False)
    retrieval = kcm.callbacks.Retrieval(captioned, bad)
    for call in (
        lambda: embed(clip, captioned, bad),
        lambda: embed_texts(clip, captions, bad),
        lambda: embed(clip, data),
        lambda: clip.evaluate(data),
        lambda: clip.fit(stream(shard, bad)),
        lambda: clip.fit(random_pairs(4), validation_data=data),
        lambda: clip.fit(random_pairs(4), callbacks=[retrieval]),
    ):
        with pytest.raises(ValueError, match=SPECIAL_TOKENS):
            call()


def test_a_bare_tokenizer_of_keras_hub_is_refused(tmp_path):
    pytest.importorskip("tensorflow")
    models = pytest.importorskip("keras_hub").models
    ours = kcm.data.CLIPTokenizer.train(["a cat", "a dog"] * 5, 600, context_length=12)
    ragged = keras_hub_tokenizer(ours, tmp_path)
    layer = models.CLIPTokenizer(ragged.vocabulary, ragged.merges, sequence_length=12)
    model = make_clip(ours.vocabulary_size, 12)
    # The second fills texts up before their end token.
    for tokenizer in (layer, models.CLIPPreprocessor(layer, sequence_length=12)):
        with pytest.raises(ValueError, match=r"CLIPPreprocessor.*Received: "):
            check_matching_tokenizer(model, tokenizer)


def test_rows_that_are_longer_than_the_tower_takes_are_an_error(clip):
    tokenizer = make_tokenizer(length=CONTEXT + 1)
    message = r"`token_ids` must .*at most 6 columns.*Received: .*\(1, 7\)"
    with pytest.raises(ValueError, match=message):
        embed_cat(clip, tokenizer)


def test_a_tokenizer_may_take_known_captions_alone(clip):
    known = make_tokenizer()(["a cat"])

    def table(texts):
        return [{"a cat": known[0]}[text] for text in texts]

    assert embed_cat(clip, table).shape == (1, 96)


# === The tokenizer that a model was trained with ===


def letters(texts):
    """Another tokenizer of the same special tokens."""
    return make_tokenizer()([text[::-1] for text in texts])


def make_clip(vocabulary_size=VOCABULARY, length=CONTEXT):
    backbone = kcm.models.clip_backbone("tiny", 16, vocabulary_size, length, 4)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=kcm.RandomMasking(0.5))
    model.compile("sgd", **FAST)
    return model


ANOTHER = r"`tokenizer` must be equal to.*`model.tokenizer`.*Received: "


def test_stages_of_any_length_take_one_tokenizer_and_no_other(shard):
    captions = ["a photo of red cats", "a drawing of blue dogs"] * 2
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 600, 16)
    other = kcm.data.CLIPTokenizer.train(["red dogs", "photos of cats"] * 2, 600, 16)
    model = make_clip(600, 16)
    for length in (3, 4, 8, 16):
        model.fit(stream(shard, tokenizer.with_context_length(length)), verbose=0)
        # A model reads as long texts as it was trained on.
        assert model.tokenizer.context_length == length
        with pytest.raises(ValueError, match=ANOTHER):
            model.fit(stream(shard, other.with_context_length(length)), verbose=0)
    model.fit(stream(shard, tokenizer.with_context_length(4)), verbose=0)
    assert model.tokenizer.context_length == 16


def test_a_checkpoint_of_another_tokenizer_is_refused(shard, tmp_path):
    checkpoint = kcm.callbacks.Checkpoint(tmp_path)
    model = make_clip()
    model.fit(stream(shard, make_tokenizer()), callbacks=[checkpoint], verbose=0)
    again = make_clip()
    with pytest.raises(ValueError, match=r"Received: .*the tokenizer"):
        again.fit(stream(shard, letters), resume_from=tmp_path, verbose=0)
    # Nothing was trained, so another tokenizer may still be taken.
    assert again.tokenizer is None
    # In another process, a function is known by its name.
    again.fit(
        stream(shard, make_tokenizer()), resume_from=tmp_path, epochs=2, verbose=0
    )


def test_the_tokenizer_may_be_changed_on_purpose(shard):
    model = make_clip()
    # Of arrays, no tokenizer is known.
    model.fit(random_pairs(4), verbose=0)
    assert model.tokenizer is None
    model.fit(stream(shard, make_tokenizer()), verbose=0)
    model.tokenizer = None
    embed_cat(model, letters)
    model.fit(stream(shard, letters), verbose=0)
    with pytest.raises(ValueError, match=ANOTHER):
        embed_cat(model, make_tokenizer())


# === A tokenizer of its own length ===


def hugging_face(end, template="<s> $A </s>", **options):
    """A tokenizer of words, whose token `</s>` has this id."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    names = {START: "<s>", end: "</s>", 1: "<pad>", 3: "<unk>"}
    words = iter(["dog", "two", "red", "boats", "on", "the", "sea", "a", "child"])
    ids = {names.get(i) or next(words, f"w{i}"): i for i in range(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(ids, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", START), ("</s>", end)]
    )
    options = {"pad_token": "<pad>", "unk_token": "<unk>", **options}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


@pytest.mark.parametrize(
    ("backbone", "end"), [(tiny_clip, END), (tiny_metaclip, METACLIP_END)]
)
def test_a_trained_model_takes_its_tokenizer_of_a_length_below_the_towers(
    shard, backbone, end
):
    tokenizer = hugging_face(end, model_max_length=4)
    model = kcm.ContrastiveModel.from_backbone(backbone())
    model.compile("sgd", **FAST)
    model.fit(stream(shard, tokenizer), verbose=0)
    # Texts are truncated as in training.
    found = embed_texts(model, ["two red boats on"], tokenizer, verbose=0)
    ids = tokenizer("two red", padding=False)["input_ids"]
    expected = keras.ops.convert_to_numpy(model.encode_text(np.array([ids])))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_tokenizer_without_a_length_makes_rows_of_the_towers():
    model = kcm.ContrastiveModel.from_backbone(tiny_clip())
    text = "two red boats on the sea"
    found, expected = (
        embed_texts(model, [text], hugging_face(END, **options), verbose=0)
        for options in ({}, {"model_max_length": CONTEXT})
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("backbone", "end", "lengths"),
    [
        (lambda: kcm.models.clip_backbone("tiny", 16, VOCABULARY, 12, 4), END, (12, 8)),
        (tiny_metaclip, METACLIP_END, (CONTEXT,)),
    ],
)
def test_towers_that_pool_at_the_end_take_rows_of_any_length_and_padding(
    backbone, end, lengths
):
    model = kcm.ContrastiveModel.from_backbone(backbone())
    tokenizers = [
        make_tokenizer(end=end, length=length, padding=padding)
        for length in lengths
        for padding in (0, end)
    ]
    texts = ["aac", "d"]
    expected = embed_texts(model, texts, tokenizers[0], verbose=0)
    for tokenizer in tokenizers[1:]:
        found = embed_texts(model, texts, tokenizer, verbose=0)
        np.testing.assert_allclose(found, expected, atol=1e-6)


# === Equal tokenizers ===


def hub_layer(words=("a", "dog"), lowercase=True, sequence_length=CONTEXT):
    models = pytest.importorskip("keras_hub").models
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = models.BertTokenizer(words, lowercase=lowercase)
    return models.BertTextEmbedderPreprocessor(
        tokenizer, sequence_length=sequence_length
    )


def vectorization(*texts, length=4):
    layer = keras.layers.TextVectorization(output_sequence_length=length)
    layer.adapt([*texts])
    return layer


def trained(text="a dog", length=8):
    return kcm.data.CLIPTokenizer.train([text] * 9, 516, length)


def words_of_clip(**options):
    name = "SimpleTokenizer"
    return getattr(pytest.importorskip("open_clip.tokenizer"), name)(**options)


EQUAL = {
    "ours": (trained, lambda: trained(length=5)),
    "keras_hub": (hub_layer, lambda: hub_layer(sequence_length=9)),
    "Keras": (lambda: vectorization("a b"), lambda: vectorization("a b", length=7)),
    "Hugging Face": (
        lambda: hugging_face(END),
        lambda: hugging_face(END, model_max_length=4),
    ),
    "open_clip": (words_of_clip, lambda: words_of_clip(context_length=9)),
}
OTHER = {
    "ours": [lambda: trained("the sea")],
    "keras_hub": [
        lambda: hub_layer(lowercase=False),
        lambda: hub_layer(("dog", "a")),
        lambda: hub_layer().tokenizer,
    ],
    "Keras": [lambda: vectorization("a b c")],
    "Hugging Face": [
        lambda: hugging_face(2),
        lambda: hugging_face(END, "</s> $A"),
        lambda: hugging_face(END, pad_token="w5"),
    ],
    "open_clip": [lambda: words_of_clip(clean="canonicalize")],
}


@pytest.mark.parametrize("kind", list(EQUAL))
def test_tokenizers_of_equal_configuration_are_equal_at_any_length(kind):
    one, same = (make() for make in EQUAL[kind])
    before = identity_of(one)
    if kind != "Keras":
        # A call may set options of the tokenizer.
        tokenize(one, ["a dog", "a"], CONTEXT)
    assert before == identity_of(one) == identity_of(same)
    others = [identity_of(make()) for make in OTHER[kind]]
    assert len({before, *others}) == 1 + len(others)
    model = kcm.ContrastiveModel(image_mlp(), text_bag(), tokenizer=one)
    check_matching_tokenizer(model, same)
    for make in [make_tokenizer, *OTHER[kind][:1]]:
        with pytest.raises(ValueError, match=ANOTHER):
            check_matching_tokenizer(model, make())


def test_a_function_equals_itself_alone():
    tokenizer = make_tokenizer()
    model = kcm.ContrastiveModel(image_mlp(), text_bag(), tokenizer=tokenizer)
    check_matching_tokenizer(model, tokenizer)
    # It has the same name.
    assert identity_of(tokenizer) == identity_of(make_tokenizer())
    with pytest.raises(ValueError, match=ANOTHER):
        check_matching_tokenizer(model, make_tokenizer())
