"""The captions of shards, without their images."""

from keras_cluster_mask.data.shards import list_shards, read_samples


def read_captions(source, caption_key="txt"):
    """All captions of WebDataset shards, for a tokenizer to be trained on.

    Example:

    ```python
    captions = kcm.data.read_captions("datasets/pictures/train-*.tar")
    tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=3000)
    ```

    Args:
        source: str or path, or a list of them; see `list_shards`.
        caption_key: str. The file extension of captions. Defaults to `"txt"`.

    Returns:
        List of str, in the order of the files. Samples without a caption are left out.
    """
    captions = (
        sample[caption_key].decode("utf-8", errors="replace").strip()
        for shard in list_shards(source)
        for sample in read_samples(shard, (caption_key,))
        if caption_key in sample
    )
    return [caption for caption in captions if caption]
