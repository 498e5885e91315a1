"""Image files of every depth, mode and orientation: the pixels of the 8-bit picture, or refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dfkd_jax.data import data_specs, decoded_cache
from dfkd_jax.data import splits as data
from dfkd_jax.data.decoded_cache import Example
from tests.helpers.tiny import tiny_config

SIZE = 8
GREY = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
SMOOTH = np.linspace(40, 200, SIZE * SIZE * 3).reshape(SIZE, SIZE, 3).round().astype(np.uint8)


def decode(encoded, channels, shape=(SIZE, SIZE)):
    """The pixels of one file, (H, W, C)."""
    row = decoded_cache.row_type((*shape, channels))
    return decoded_cache.decode([Example("a/b.png", encoded, 0)], 1, row, 1, resize=False)[0][
        "image"
    ]


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(values, colour_type, depth, *chunks):
    """A PNG file by hand: (H, W) or (H, W, N) values of `depth` bits, as Pillow writes no such."""

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    height, width = values.shape[:2]
    if depth < 8:
        bits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., -depth:]
        lines = np.packbits(bits.reshape(height, -1), axis=-1)
    else:
        lines = values.astype(">u2" if depth == 16 else np.uint8)
    pixels = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def with_alpha(values, alpha=255):
    values = values.reshape(SIZE, SIZE, -1)
    return np.concatenate([values, np.full((SIZE, SIZE, 1), alpha, values.dtype)], axis=-1)


def sixteen(values, by):
    """The same picture of 16 bits: its greatest value is 65535 or 65280."""
    values = values.astype(np.uint16)
    return values * 257 if by == 257 else values << 8


def grey_files():
    """Files of the grey picture, by what they are."""
    image = Image.fromarray(GREY)
    yield "8 bits", saved(image)
    for by in (257, 256):
        yield f"16 bits, times {by}", png(sixteen(GREY, by), 0, 16)
        yield f"16 bits with alpha, times {by}", png(with_alpha(sixteen(GREY, by), 65535), 4, 16)
        yield f"16 bits RGB, times {by}", png(sixteen(GREY[..., None].repeat(3, -1), by), 2, 16)
    yield "16 bits by Pillow", saved(Image.fromarray(sixteen(GREY, 257)))
    yield "LA", saved(image.convert("LA"))
    yield "RGB", saved(image.convert("RGB"))
    yield "RGBA", saved(image.convert("RGBA"))
    yield "BMP", saved(image, "BMP")
    yield "WebP", saved(image, "WEBP", lossless=True)
    yield "palette", saved(image.convert("P"))
    yield "GIF under another name", saved(image, "GIF")


def colour_files():
    """Files of the picture in colour, by what they are."""
    image = Image.fromarray(COLOUR)
    palette = image.quantize(SIZE * SIZE)
    assert np.array_equal(palette.convert("RGB"), COLOUR)
    yield "8 bits", saved(image)
    for by in (257, 256):
        yield f"16 bits, times {by}", png(sixteen(COLOUR, by), 2, 16)
        yield f"16 bits with alpha, times {by}", png(with_alpha(sixteen(COLOUR, by), 65535), 6, 16)
    yield "RGBA", saved(image.convert("RGBA"))
    yield "BMP", saved(image, "BMP")
    yield "BMP of 32 bits", saved(image.convert("RGBA"), "BMP")
    yield "WebP", saved(image, "WEBP", lossless=True)
    yield "palette", saved(palette)
    yield "palette with alpha", saved(palette, transparency=bytes([255] * SIZE * SIZE))
    yield "transparent colour in no pixel", saved(image, transparency=absent(COLOUR))
    yield (
        "the first of two frames",
        saved(
            image,
            "WEBP",
            save_all=True,
            append_images=[Image.new("RGB", image.size)],
            lossless=True,
        ),
    )
    yield (
        "animated PNG",
        saved(image, save_all=True, append_images=[Image.new("RGB", image.size, 7)]),
    )


def test_the_first_picture_of_a_telephone_counts():
    """Which keeps a second one in the same file."""
    encoded = saved(
        Image.fromarray(SMOOTH), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]
    )
    np.testing.assert_allclose(decode(encoded, 3).astype(int), SMOOTH, atol=12)


def absent(picture):
    """A colour that no pixel has."""
    seen = set(map(tuple, picture.reshape(-1, 3).tolist()))
    return next((v, v, v) for v in range(256) if (v, v, v) not in seen)


@pytest.mark.parametrize("kind, encoded", list(grey_files()))
def test_a_grey_picture_has_the_same_pixels_in_every_file(kind, encoded):
    np.testing.assert_array_equal(decode(encoded, 1)[..., 0], GREY)
    np.testing.assert_array_equal(decode(encoded, 3), GREY[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind, encoded", list(colour_files()))
def test_a_picture_in_colour_has_the_same_pixels_in_every_file(kind, encoded):
    np.testing.assert_array_equal(decode(encoded, 3), COLOUR)
    # ITU-R 601, and of all files alike, where Pillow rounds a palette otherwise.
    luma = COLOUR @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode(encoded, 1)[..., 0], luma, atol=0.51)
    np.testing.assert_array_equal(decode(encoded, 1), decode(saved(Image.fromarray(COLOUR)), 1))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_bits_span_the_whole_range(depth, channels):
    values = np.random.default_rng(2).integers(0, 2**depth, (SIZE, SIZE))
    wanted = (values * (255 // (2**depth - 1)))[..., None].repeat(channels, -1)
    np.testing.assert_array_equal(decode(png(values, 0, depth), channels), wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_black_and_white_bmp(channels):
    picture = Image.fromarray(GREY).convert("1")
    wanted = (np.asarray(picture) * 255)[..., None].repeat(channels, -1)
    np.testing.assert_array_equal(decode(saved(picture, "BMP"), channels), wanted)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK", "YCbCr"])
def test_jpeg_files_of_every_mode_are_the_picture_nearly(mode):
    picture = Image.fromarray(SMOOTH)
    picture = picture.convert("L").convert("RGB") if mode == "L" else picture
    encoded = saved(picture.convert(mode), "JPEG", quality=100, subsampling=0)
    np.testing.assert_allclose(decode(encoded, 3).astype(int), np.asarray(picture), atol=4)
    grey = np.asarray(picture.convert("L"), int)
    np.testing.assert_allclose(decode(encoded, 1)[..., 0].astype(int), grey, atol=4)


def transparent_files():
    image, grey = Image.fromarray(COLOUR), Image.fromarray(GREY)
    half = with_alpha(COLOUR)
    half[2, 3, 3] = 254
    yield "RGBA", saved(Image.fromarray(half)), "RGBA"
    yield "WEBP", saved(Image.fromarray(half), "WEBP", lossless=True), "RGBA"
    yield "LA", saved(Image.fromarray(with_alpha(GREY, 128), "LA")), "LA"
    yield "16 bits with alpha", png(with_alpha(sixteen(COLOUR, 257), 65000), 6, 16), "RGBA"
    yield "palette", saved(image.quantize(64), transparency=bytes([255] * 5 + [0])), "P"
    yield "palette index", saved(image.quantize(64), transparency=5), "P"
    yield "colour", saved(image, transparency=tuple(COLOUR[0, 0].tolist())), "RGB"
    yield "grey", saved(grey, transparency=int(GREY[0, 0])), "L"
    for depth, values in ((16, sixteen(GREY, 257)), (2, GREY >> 6)):
        key = (b"tRNS", struct.pack(">H", int(values[0, 0])))
        yield f"grey of {depth} bits", png(values, 0, depth, key), "L" if depth == 2 else "I;16"
    values = sixteen(COLOUR, 257)
    key = (b"tRNS", struct.pack(">HHH", *values[0, 0].tolist()))
    yield "colour of 16 bits", png(values, 2, 16, key), "RGB"


def refusal(encoded, channels):
    with pytest.raises(ValueError) as caught:
        decode(encoded, channels)
    sentence = str(caught.value)
    assert sentence.startswith("a/b.png has ") and sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("kind, encoded, mode", list(transparent_files()))
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_somewhere_is_refused(kind, encoded, mode, channels):
    sentence = refusal(encoded, channels)
    assert "transparent" in sentence and f"Pillow's mode {mode})" in sentence


@pytest.mark.parametrize(
    "values, form, mode",
    [
        (np.full((SIZE, SIZE), 0.5, np.float32), "TIFF", "F"),
        (np.full((SIZE, SIZE), 70000, np.int32), "TIFF", "I"),
        (np.full((SIZE, SIZE), 200, np.int32), "TIFF", "I"),
        (np.full((SIZE, SIZE), 4095, np.uint16), "TIFF", "I;16"),  # of a camera, perhaps
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_values_without_a_known_range_are_refused(values, form, mode, channels):
    sentence = refusal(saved(Image.fromarray(values), form), channels)
    assert f"Pillow's mode {mode}, whose values have no known range" in sentence


def test_16_bits_as_older_pillow_reads_them(monkeypatch):
    """As mode I, of 32 bits."""
    encoded = png(sixteen(GREY, 257), 0, 16)
    original = Image.open

    def opened(file):
        image = original(file)
        older = Image.fromarray(np.asarray(image).astype(np.int32))
        older.format = image.format
        return older

    monkeypatch.setattr(Image, "open", opened)
    np.testing.assert_array_equal(decode(encoded, 1)[..., 0], GREY)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_an_image_lies_as_it_is_looked_at(orientation, form):
    picture = np.zeros((SIZE, 2 * SIZE), np.uint8)
    picture[:, SIZE:] = 160
    picture[: SIZE // 2, :SIZE] = 80  # the corners are 80, 160, 160, 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    encoded = saved(Image.fromarray(picture), form, exif=exif, **options)
    # As the standard has it: what the first row and column of the file are in the scene.
    wanted = {
        2: picture[:, ::-1],  # top, right
        3: picture[::-1, ::-1],  # bottom, right
        4: picture[::-1],  # bottom, left
        5: picture.T,  # left, top
        6: picture.T[:, ::-1],  # right, top
        7: picture.T[::-1, ::-1],  # right, bottom
        8: picture.T[::-1],  # left, bottom
    }.get(orientation, picture)
    found = decode(encoded, 1, wanted.shape)[..., 0]
    np.testing.assert_allclose(found.astype(int), wanted, atol=6)


def test_exif_data_that_cannot_be_read_turn_nothing():
    encoded = saved(Image.fromarray(GREY), exif=b"Exif\0\0no such thing at all")
    np.testing.assert_array_equal(decode(encoded, 1)[..., 0], GREY)


def config_of(root):
    fields = {"name": "folder", "data_dir": str(root), "image_size": SIZE, "channels": 1}
    fields |= {"mean": (0.5,), "std": (0.2,)}
    return tiny_config(**{f"dataset.{name}": value for name, value in fields.items()})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dfkd_jax"


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        path = tmp_path / "photos" / "test" / name / "1.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(sixteen(GREY, 257), 0, 16))
    return tmp_path / "photos"


def test_a_folder_of_16_bit_files_is_that_of_8_bits(folder, cache):
    images, _ = data.load(data_specs.spec(config_of(folder)), "test", folder)
    np.testing.assert_array_equal(images, np.stack([GREY, GREY])[..., None])


def test_what_another_rule_decoded_is_not_used(folder, cache, monkeypatch):
    spec = data_specs.spec(config_of(folder))
    with monkeypatch.context() as context:
        context.setattr(decoded_cache, "RULE", decoded_cache.RULE - 1)
        context.setattr(decoded_cache, "_eight_bits", lambda image, *_: Image.new("L", image.size))
        assert not data.load(spec, "test", folder).images.any()
    np.testing.assert_array_equal(data.load(spec, "test", folder).images[0, ..., 0], GREY)
    assert len(list(cache.iterdir())) == 2


def test_a_file_of_a_folder_that_is_refused_is_named(folder, cache):
    bad = folder / "test" / "b" / "2.png"
    bad.write_bytes(png(with_alpha(GREY, 9), 4, 8))
    with pytest.raises(ValueError) as caught:
        data.load(data_specs.spec(config_of(folder)), "test", folder)
    assert str(caught.value).startswith(f"{bad} has transparent pixels")
    assert not cache.exists()
