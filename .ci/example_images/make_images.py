"""Build the captioned image dataset from public Debian packages.

The images are the colour emoji of Noto Color Emoji, with their Unicode names, and
the public-domain drawings of the Open Clip Art Library, with their titles and
keywords. Install the sources (about 110 MB), then run the script::

    apt-get install fonts-noto-color-emoji unicode-data
    apt-get install openclipart-png openclipart-svg
    python make_images.py

It writes WebDataset shards (``train-00000.tar`` and so on) to the folder of the package
or the folder given with ``--output``, and ``contact_sheet.png`` beside itself. It needs
Pillow built with Raqm (as the wheels on PyPI are) and NumPy. The same packages and the
same Pillow give the same bytes.
"""

import argparse
import hashlib
import html
import io
import json
import re
import sys
import tarfile
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

HERE = Path(__file__).resolve().parent
IMAGES = HERE.parents[1] / "keras_cluster_mask" / "datasets" / "images"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_NAMES = Path("/usr/share/unicode/emoji/emoji-test.txt")
CLIPART_PNG = Path("/usr/share/openclipart/png")
CLIPART_SVG = Path("/usr/share/openclipart/svg")
PACKAGES = {
    FONT: "fonts-noto-color-emoji",
    EMOJI_NAMES: "unicode-data",
    CLIPART_PNG: "openclipart-png",
    CLIPART_SVG: "openclipart-svg",
}

SIZE = 64  # side of an image, in pixels
MARGIN = 2  # transparent border on every side, in pixels
QUALITY = 60  # lossy WebP colour quality
ALPHA_QUALITY = 60
TRAIN_SHARDS = 4
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1  # the rest is the test split
MAX_BYTES = 12_000_000  # for all shards together

# Near-duplicates differ in few bits of the 64-bit dHash and little in colour: by the
# root mean square of 16x16 RGB, in levels of 255 and as a share of the image's own
# standard deviation, since thin drawings on white all look alike to the former.
MAX_HASH_DISTANCE = 6
MAX_COLOUR_DISTANCE = 14.0
MAX_COLOUR_SHARE = 0.25
MAX_PER_CAPTION = 1  # so that a search for a caption has one right answer
MIN_STRAY = 6.0  # standard deviation below which an image counts as empty
MIN_COVER = 0.03  # share of the canvas that must be opaque
MAX_SOURCE_PIXELS = 60_000_000

MAX_WORDS = 12
MAX_KEYWORDS = 3
MIN_KEYWORD_USES = 8  # rarer keywords are mostly typing errors or other languages

# Drawings that differ by an angle or a number only, toolbar icons and tiled patterns.
SKIPPED_FOLDERS = (
    "computer/buttons/",
    "computer/icons/",
    "recreation/games/cards/",
    "shapes/flowchart/",
    "shapes/stars/",
    "signs_and_symbols/led/",
    "special/patterns/",
)
XLINK = "{http://www.w3.org/1999/xlink}"
PUBLIC_DOMAIN = {
    "http://web.resource.org/cc/PublicDomain",
    "http://creativecommons.org/licenses/publicdomain/",
}
# Titles shared by a whole collection: the file name says more.
COLLECTION_TITLES = {
    "",
    "advertising",
    "aiga_symbol_signs",
    "australian maps",
    "balloons-aj",
    "blueberry - iconset",
    "etiquette icons",
    "homes clipart",
    "map symbols",
    "pc connectors",
    "r15 general",
    "r16 sibmission",
    "road signs",
    "sallite",
    "svg road signs",
    "various cliparts",
}
# Keywords about the collection rather than about the image.
SKIPPED_KEYWORDS = {
    "action", "activities", "advertising", "africa", "america", "architetto",
    "architetto francesco rollandin", "arrowshape", "asia", "black", "buttons",
    "city", "coastline", "collection", "computer icon", "desserts", "entertainment",
    "europe", "fidi", "flag", "flags", "geography", "hash", "home", "icon", "icons",
    "inkscape", "logos", "magick", "menu", "metal", "miscellany", "moon space",
    "nice", "object", "objects", "oceania", "office", "openclipart",
    "organizations", "places", "recreation", "shape", "shapes", "sign", "signs",
    "signs and symbols", "silhouette", "special", "states", "subnational", "symbol",
    "symbols", "theme", "things", "tools", "transportation",
    "united nations member", "unsorted", "web", "webpage", "work",
}  # fmt: skip
RENAMED_KEYWORDS = {
    "airtravel": "air travel",
    "appicon": "icon",
    "animals": "animal",
    "bodypart": "body part",
    "mapsym": "map symbol",
    "musicstuff": "music",
    "networksym": "computer network",
    "religholiday": "holiday",
    "roadsign": "road sign",
    "roadtravel": "road travel",
    "signalflag": "signal flag",
    "sports": "sport",
    "stickmen": "stick figure",
    "unitedstates": "united states",
    "vehicles": "vehicle",
    "weathersym": "weather",
}


@dataclass
class Sample:
    """One captioned image on its transparent square canvas."""

    key: str
    source: str
    caption: str
    image: Image.Image

    @cached_property
    def on_white(self) -> Image.Image:
        """The image composited on white, RGB."""
        canvas = Image.new("RGBA", self.image.size, "white")
        return Image.alpha_composite(canvas, self.image).convert("RGB")

    @cached_property
    def rank(self) -> str:
        """A stable pseudo-random rank that orders the images."""
        return hashlib.sha256(self.key.encode()).hexdigest()


# Captions


def plain(text: str) -> str:
    """Lower-case ASCII text with single spaces."""
    text = html.unescape(text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(text.lower().split())


def emoji_caption(name: str) -> str:
    """Turn a Unicode emoji name into a phrase."""
    name = re.sub(r"^flag: ", "flag of ", name)
    return plain(name.replace(":", ",").replace("#", "number"))


def clean_title(title: str) -> str:
    """Turn a clip-art title or file name into words, without file-name noise."""
    title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", html.unescape(title))
    title = plain(title).replace("_", " ")
    title = re.sub(r"^clip ?art by .*? - ", "", title)
    title = re.sub(r"\b(svg|clip ?art|openclipart|aj)\b|\bby [a-z. ]+$", "", title)
    title = re.sub(r"\((colou?r|transparent fix|correct)\)|\.svg\b", "", title)
    title = re.sub(r" - rpg map elements$| icon$", "", title)
    title = title if " " in title else title.replace("-", " ")
    if re.search(r"\(b and w\)|\b(bw|b w)\b", title):
        rest = re.sub(r"\(b and w\)|\b(bw|b w)\b", "", title)
        title = f"black and white {rest}"
    # "guitar2", "scissors 2" and "BlueMan#202" are counters, "M16" is a name.
    title = re.sub(r"(?<=[a-z]{3})[ #-]*\d+(?= |$)|[ #-]+\d+$", "", title)
    title = re.sub(r"\s*\(([^)]*)\)", r", \1", title)
    title = re.sub(r"[^a-z0-9',/. -]|(?<![a-z0-9])-|-(?![a-z0-9])", " ", title)
    title = re.sub(r"[ ,]*,[ ,]*", ", ", title)
    title = " ".join(title.split()).strip(" ,.-/'")
    return re.sub(r"^(an?|the) (?=[a-z]{2})", "", title)


def file_title(stem: str) -> str:
    """Words from a file name."""
    sign = stem.startswith("aiga_")
    title = re.sub(r"\d+$", "", stem.removeprefix("aiga_").strip("_"))
    title = title.replace("tickey", "ticket")  # as the collection spells it
    title = re.sub(r"_\d_symbol_.*", " on a garden plan", title)
    title = re.sub(r"^jigsaw_([a-z]+)_\d*$", r"\1 jigsaw puzzle piece", title)
    title = re.sub(r"^(sm|fc|baloon|ppl|gift)(?=[\d_]|$)", _short_name, title)
    title = clean_title(title.replace("-", " "))
    title = re.sub(r"(.*) simple$", r"simple \1", title)
    return f"{title} sign" if sign and title else title


def _short_name(match: re.Match) -> str:
    """Spell out the abbreviations that file names use."""
    names = {"sm": "stick man", "fc": "flowchart", "baloon": "balloon"}
    return names.get(match[1], {"ppl": "people"}.get(match[1], match[1]))


def flag_title(title: str) -> str:
    """Turn "Canada - Alberta" into "flag of alberta, canada"."""
    title = re.sub(r"-(?=[a-z])", " - ", title) if title.count("-") == 1 else title
    title = re.sub(r"\s+-\s+|\s*-\s+", " - ", title)
    parts = [part for part in title.split(" - ") if part]
    historic = parts[0] == "historic"
    parts = parts[1:] if historic else parts
    kind = "historic flag" if historic else "flag"
    return f"{kind} of {', '.join(parts[::-1])}" if parts else ""


def clipart_title(raw: str, path: Path, keywords: set[str], titles: dict) -> str:
    """Choose the words for a clip-art image; empty when it has no good ones."""
    title = " ".join(raw.lower().split())
    flags = path.as_posix().startswith("signs_and_symbols/flags/")
    flag = flags and bool(keywords & {"flag", "flags"})
    if title in titles["by_title"]:
        return titles["by_title"][title] or ""
    named = re.match(r"clipart by (.*?) - (.*)", title)
    collection = title in COLLECTION_TITLES or bool(named)
    if collection and path.stem in titles["by_file"]:
        return titles["by_file"][path.stem] or ""
    if collection and not (flag and named):
        words = file_title(path.stem)
        if title == "australian maps":
            words = f"map of {words}"
        elif "road signs" in title and words:
            words += " road sign"
        return words
    if flag and "flag" not in title:
        words = plain(named[2] if named else title).replace("_", " ")
        return flag_title(words)
    return clean_title(raw)


def add_keywords(title: str, keywords: list[str]) -> str:
    """Append keywords that say something new, within the word limit."""
    caption, seen = title, {_stem(word) for word in re.findall(r"[a-z0-9]+", title)}
    added = 0
    for keyword in keywords:
        words = keyword.split()
        fits = len(caption.split()) + len(words) <= MAX_WORDS
        if added == MAX_KEYWORDS or not fits or seen.issuperset(map(_stem, words)):
            continue
        caption += f", {keyword}"
        seen.update(map(_stem, words))
        added += 1
    return caption


def _stem(word: str) -> str:
    """A word without its plural ending, to compare words."""
    return re.sub(r"(?<=..)(ies|y|es|e|s)$", "", word)


# Sources


def check_sources() -> None:
    """Stop with a clear message when something is missing."""
    for path, package in PACKAGES.items():
        if not path.exists():
            sys.exit(f"{path} is missing: install it with apt-get install {package}")
    if not features.check("raqm"):
        sys.exit("This Pillow lacks Raqm, which draws emoji sequences: use the wheel")


def emoji_sequences() -> Iterator[tuple[str, str]]:
    """Yield each emoji that the dataset uses, with its Unicode name."""
    group = subgroup = ""
    for line in EMOJI_NAMES.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif "; fully-qualified" in line:
            codes, _, comment = line.partition(";")
            text = "".join(chr(int(code, 16)) for code in codes.split())
            name = re.split(r" E\d+\.\d+ ", comment, maxsplit=1)[1]
            # Skin tones repeat one drawing in five colours.
            toned = any(0x1F3FB <= ord(letter) <= 0x1F3FF for letter in text)
            if not toned and group != "Component" and subgroup != "keycap":
                yield text, name


def emoji_samples() -> Iterator[Sample]:
    """Draw the emoji of the font with their names."""
    # The font holds bitmaps of this one size.
    font = ImageFont.truetype(FONT, 109, layout_engine=ImageFont.Layout.RAQM)
    width = font.getlength("\N{GRINNING FACE}")
    for text, name in emoji_sequences():
        if font.getlength(text) > 1.5 * width:
            continue  # no glyph for the whole sequence: its parts are drawn in a row
        image = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(image).text((10, 20), text, font=font, embedded_color=True)
        codes = "-".join(f"{ord(letter):x}" for letter in text)
        canvas = fit(image)
        if canvas is not None:
            yield Sample(f"emoji-{codes}", "emoji", emoji_caption(name), canvas)


def read_metadata(path: Path) -> tuple[str, list[str], str]:
    """Title, keywords and licence of a clip-art SVG; empty when unusable."""
    root = ET.parse(path).getroot()
    work = root.find(".//{*}Work")
    links = [image.get(f"{XLINK}href", "") for image in root.iterfind(".//{*}image")]
    # A linked file is not in the package: its image shows an error message.
    if work is None or not all(link.startswith("data:") for link in links):
        return "", [], ""
    licence = work.find("{*}license")
    resource = "" if licence is None else next(iter(licence.attrib.values()), "")
    words = (item.text for item in work.iterfind("{*}subject//{*}li"))
    keywords = [plain(word).replace("_", " ") for word in words if word]
    keywords = [RENAMED_KEYWORDS.get(word, word) for word in keywords]
    return work.findtext("{*}title") or "", keywords, resource


def clipart_samples(titles: dict, counts: Counter) -> Iterator[Sample]:
    """Read the clip art that is free, described and of a useful kind."""
    found = []
    for png in sorted(CLIPART_PNG.rglob("*.png")):
        path = png.relative_to(CLIPART_PNG)
        svg = CLIPART_SVG / path.with_suffix(".svg")
        if png.is_symlink() or not svg.is_file():
            counts["links"] += 1
        elif path.as_posix().startswith(SKIPPED_FOLDERS):
            counts["icons, buttons, stars, cards and patterns"] += 1
        else:
            title, keywords, licence = read_metadata(svg)
            if licence in PUBLIC_DOMAIN:
                found.append((path, title, keywords))
            else:
                counts["no public-domain licence stated, or incomplete"] += 1
    uses = Counter(word for _, _, keywords in found for word in set(keywords))
    for path, title, keywords in found:
        title = clipart_title(title, path, set(keywords), titles)
        if not re.search("[a-z]{2}", title) or len(title.split()) > MAX_WORDS:
            counts["title says too little or too much"] += 1
            continue
        # Common keywords name the kind of thing, in words spelled right.
        keywords = [
            word
            for word in dict.fromkeys(keywords)
            if uses[word] >= MIN_KEYWORD_USES
            and word not in SKIPPED_KEYWORDS
            and re.fullmatch("[a-z ]{3,}", word)
        ]
        keywords.sort(key=lambda word: (uses[word], word))
        canvas = read_png(CLIPART_PNG / path)
        if canvas is None:
            counts["empty or too large"] += 1
            continue
        # Keys must have no dots or slashes; underscores keep file names apart.
        name = re.sub(r"[^A-Za-z0-9_]", "-", path.with_suffix("").as_posix())
        caption = add_keywords(title, keywords)
        yield Sample(f"clipart-{name}", "clip art", caption, canvas)


def read_png(path: Path) -> Image.Image | None:
    """Open a PNG and fit it on the canvas."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_SOURCE_PIXELS:
            return None
        image = image.convert("RGBA")
    return fit(image)


# Images


def fit(image: Image.Image) -> Image.Image | None:
    """Centre an image on the transparent canvas; nothing for an empty one."""
    # Faint pixels would widen the box without being seen.
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    inner = SIZE - 2 * MARGIN
    scale = inner / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(image, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return canvas


def is_empty(sample: Sample) -> bool:
    """Whether hardly anything can be seen, on white."""
    cover = np.asarray(sample.image)[..., 3].mean() / 255
    return cover < MIN_COVER or stray(sample) < MIN_STRAY


def stray(sample: Sample) -> float:
    """Standard deviation of the colours, on white."""
    return float(np.asarray(sample.on_white).std())


def difference_hash(image: Image.Image) -> np.ndarray:
    """64 bits: whether each of 8x8 cells is brighter than its right neighbour."""
    gray = image.convert("L").resize((9, 8), Image.Resampling.BOX)
    cells = np.asarray(gray, np.int16)
    return (cells[:, 1:] > cells[:, :-1]).ravel()


def drop_duplicates(samples: list[Sample], counts: Counter) -> list[Sample]:
    """Keep the first of every group of equal or nearly equal images."""
    hashes = np.zeros((len(samples), 64), bool)
    colours = np.zeros((len(samples), 16 * 16 * 3), np.float32)
    kept, seen = [], set()
    for sample in samples:
        digest = hashlib.sha256(sample.on_white.tobytes()).digest()
        if digest in seen:
            counts["exact duplicates"] += 1
            continue
        seen.add(digest)
        small = sample.on_white.resize((16, 16), Image.Resampling.BOX)
        bits, colour = difference_hash(sample.on_white), np.asarray(small).ravel()
        known = len(kept)
        near = np.flatnonzero((hashes[:known] != bits).sum(1) <= MAX_HASH_DISTANCE)
        error = np.square(colours[near] - colour).mean(1)
        limit = min(MAX_COLOUR_DISTANCE, MAX_COLOUR_SHARE * stray(sample))
        if (error <= limit**2).any():
            counts["near duplicates"] += 1
            continue
        hashes[known], colours[known] = bits, colour
        kept.append(sample)
    return kept


def limit_captions(samples: list[Sample], counts: Counter) -> list[Sample]:
    """Keep so many images of each caption, chosen by rank."""
    used, kept = Counter(), []
    for sample in sorted(samples, key=lambda sample: sample.rank):
        used[sample.caption] += 1
        if used[sample.caption] > MAX_PER_CAPTION:
            counts["more of the same caption"] += 1
        else:
            kept.append(sample)
    return kept


# Output


def split_of(caption: str) -> str:
    """The split of a caption, the same in every run."""
    digest = hashlib.sha256(f"split:{caption}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    if place < TRAIN_SHARE:
        return "train"
    return "validation" if place < TRAIN_SHARE + VALIDATION_SHARE else "test"


def encode(image: Image.Image) -> bytes:
    """The smaller of lossy and lossless WebP: flat drawings favour lossless."""
    options = (
        {"method": 6, "quality": QUALITY, "alpha_quality": ALPHA_QUALITY},
        {"method": 4, "quality": 75, "lossless": True},
    )
    encoded = []
    for option in options:
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", **option)
        encoded.append(buffer.getvalue())
    return min(encoded, key=len)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file whose header depends on its name and contents alone."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, samples: list[Sample]) -> int:
    """Write one shard and return its size in bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            add_member(tar, f"{sample.key}.webp", encode(sample.image))
            add_member(tar, f"{sample.key}.txt", sample.caption.encode())
    return path.stat().st_size


def write_contact_sheet(path: Path, samples: list[Sample], columns: int = 8) -> None:
    """Show images with their captions on white."""
    cell, height, pad = 132, 122, 8
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * height + pad), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for index, sample in enumerate(samples):
        left, top = index % columns * cell, index // columns * height + pad
        sheet.paste(sample.on_white, (left + (cell - SIZE) // 2, top))
        text = wrap(sample.caption, font, cell - 12)
        middle = (left + cell // 2, top + SIZE + 4)
        draw.multiline_text(
            middle, text, "black", font, anchor="ma", align="center", spacing=2
        )
    sheet.quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int = 3) -> str:
    """Break a caption into lines that fit; an ellipsis marks what is left out."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    rows = [row for row in rows if row]
    if len(rows) > lines:
        rows = rows[:lines]
        rows[-1] = rows[-1].rstrip(",") + "…"
    return "\n".join(rows)


def collect() -> tuple[list[Sample], Counter]:
    """All images of the dataset, in rank order, and counts of those left out."""
    titles = json.loads((HERE / "titles.json").read_text(encoding="utf-8"))
    counts: Counter = Counter()
    samples = list(emoji_samples())
    print(f"{len(samples):5} emoji drawn", flush=True)
    clipart = list(clipart_samples(titles, counts))
    print(f"{len(clipart):5} clip-art images read", flush=True)
    described = [*samples, *clipart]
    samples = [sample for sample in described if not is_empty(sample)]
    counts["empty or too large"] += len(described) - len(samples)
    samples = limit_captions(drop_duplicates(samples, counts), counts)
    if len({sample.key for sample in samples}) != len(samples):
        sys.exit("Two images share a key")
    return samples, counts


def write_shards(folder: Path, samples: list[Sample]) -> None:
    """Write the shards of all splits and report them."""
    total = 0
    for split in ("train", "validation", "test"):
        members = [p for p in samples if split_of(p.caption) == split]
        sources = Counter(sample.source for sample in members)
        print(f"{split}: {len(members)} images, {dict(sorted(sources.items()))}")
        shards = TRAIN_SHARDS if split == "train" else 1
        for index in range(shards):
            path = folder / f"{split}-{index:05}.tar"
            size = write_shard(path, members[index::shards])
            print(f"  {path.name}: {size:,} bytes", flush=True)
            total += size
    print(f"total: {total:,} bytes")
    if total > MAX_BYTES:
        sys.exit(f"The shards exceed {MAX_BYTES:,} bytes: lower QUALITY")


def main() -> None:
    """Build the dataset."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of shards")
    folder = parser.parse_args().output
    check_sources()
    folder.mkdir(parents=True, exist_ok=True)
    samples, counts = collect()
    for reason, count in counts.most_common():
        print(f"{count:5} left out: {reason}")
    write_shards(folder, samples)
    train = [p for p in samples if split_of(p.caption) == "train"]
    write_contact_sheet(HERE / "contact_sheet.png", train[:48])


if __name__ == "__main__":
    Image.MAX_IMAGE_PIXELS = None  # the packages are trusted; large ones are skipped
    main()
