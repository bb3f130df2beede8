"""Broken and odd image files as customers have them, built in memory, each with what must become of it.

A picture that can be read shows four coloured quadrants; the expectation is their colours and where they are, written
down by hand, so that it does not depend on any decoder.
"""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

Colour = tuple[int, int, int]

RED, GREEN, BLUE, YELLOW = (250, 10, 20), (10, 200, 30), (20, 30, 240), (240, 230, 10)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
QUADRANTS = (RED, GREEN, BLUE, YELLOW)  # upper left, upper right, lower left, lower right
SIDE_PX = 32

# The limits that the corpus is written for.
MAX_BYTES = 32 * 2**20
MAX_PX = 50_000_000


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: What is odd about it.
        suffix: Its file name's ending, which need not be true.
        content: Its bytes.
        code: The error code it must get; None: it must be read.
        quadrants: Colours of the four quadrants, where it must be read.
        tolerance: Largest difference of a channel at the quadrants' centres: loss of the format.
    """

    name: str
    suffix: str
    content: bytes
    code: str | None = None
    quadrants: Sequence[Colour] = QUADRANTS
    tolerance: int = 0


# -- pictures ----------------------------------------------------------------------------------------------


def picture(colours: Sequence[Colour] = QUADRANTS, side: int = SIDE_PX) -> Image.Image:
    """Four quadrants."""
    half = side // 2
    image = Image.new("RGB", (side, side))
    for place, colour in enumerate(colours):
        left, top = half * (place % 2), half * (place // 2)
        image.paste(colour, (left, top, left + half, top + half))
    return image


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _grey(colour: Colour) -> Colour:
    luma = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])  # ITU-R BT.601
    return (luma, luma, luma)


GREYS = tuple(_grey(colour) for colour in QUADRANTS)


def _cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


# -- PNG by hand -------------------------------------------------------------------------------------------

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_by_hand(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, *, interlaced: bool = False, extra: bytes = b""
) -> bytes:
    """A PNG of filtered rows; `extra` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlaced)
    return PNG_MAGIC + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _png_sixteen_bit_rgb() -> bytes:
    pixels = np.asarray(picture()).astype(">u2") * 257
    return png_by_hand(SIDE_PX, SIDE_PX, 16, 2, b"".join(b"\0" + row.tobytes() for row in pixels))


def _png_interlaced() -> bytes:
    pixels = np.asarray(picture())
    # Adam7: first row and column, and steps, of each pass.
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = (b"\0" + row.tobytes() for top, left, down, right in passes for row in pixels[top::down, left::right])
    return png_by_hand(SIDE_PX, SIDE_PX, 8, 2, b"".join(rows), interlaced=True)


def _png_without(content: bytes, kind: bytes) -> bytes:
    place = content.index(kind) - 4
    length = struct.unpack(">I", content[place : place + 4])[0]
    return content[:place] + content[place + 12 + length :]


def _png_with_wrong_checksum(content: bytes, kind: bytes) -> bytes:
    place = content.index(kind) - 4
    last = place + 8 + struct.unpack(">I", content[place : place + 4])[0]
    return content[:last] + bytes([content[last] ^ 0xFF]) + content[last + 1 :]


def _png_with(extra: bytes, content: bytes) -> bytes:
    after_header = len(PNG_MAGIC) + 25
    return content[:after_header] + extra + content[after_header:]


# -- TIFF by hand ------------------------------------------------------------------------------------------


def tiff_by_hand(tags: dict[int, Sequence[int]], data: bytes, order: str = "<") -> bytes:
    """A TIFF of one directory; tag 273 or 324 must be the offset 8, where the data begins."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    data += b"\0" * (len(data) % 2)
    directory = 8 + len(data)
    extra_place = directory + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    for tag, values in sorted(tags.items()):
        kind, size, form = (3, 2, "H") if max(values) < 65536 else (4, 4, "I")
        packed = struct.pack(f"{order}{len(values)}{form}", *values)
        if len(values) * size > 4:
            packed, extra = struct.pack(f"{order}I", extra_place + len(extra)), extra + packed
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return (
        magic
        + struct.pack(f"{order}I", directory)
        + data
        + struct.pack(f"{order}H", len(tags))
        + entries
        + bytes(4)
        + extra
    )


def _tiff_tags(width: int, height: int, bits: int = 8) -> dict[int, Sequence[int]]:
    return {256: [width], 257: [height], 258: [bits] * 3, 259: [1], 262: [2], 277: [3], 284: [1]}


def _tiff_tiled() -> bytes:
    pixels = np.asarray(picture())
    tiles = [pixels[top : top + 16, left : left + 16].tobytes() for top in (0, 16) for left in (0, 16)]
    places = [8 + 768 * number for number in range(4)]
    tags = _tiff_tags(SIDE_PX, SIDE_PX) | {322: [16], 323: [16], 324: places, 325: [768] * 4}
    return tiff_by_hand(tags, b"".join(tiles))


def _tiff_sixteen_bit_rgb(order: str) -> bytes:
    data = (np.asarray(picture()).astype(f"{order}u2") * 257).tobytes()
    tags = _tiff_tags(SIDE_PX, SIDE_PX, 16) | {273: [8], 278: [SIDE_PX], 279: [len(data)]}
    return tiff_by_hand(tags, data, order)


def _tiff_claiming(width: int, height: int) -> bytes:
    return tiff_by_hand(_tiff_tags(width, height) | {273: [8], 278: [height], 279: [64]}, bytes(64))


def _tiff_with_a_huge_tile() -> bytes:
    """A small picture in a real tile of 8192 x 8192, which a decoder has to inflate whole."""
    tile = zlib.compress(bytes(8192 * 8192 * 3), 1)
    tags = _tiff_tags(SIDE_PX, SIDE_PX) | {259: [8], 322: [8192], 323: [8192], 324: [8], 325: [len(tile)]}
    return tiff_by_hand(tags, tile)


# -- JPEG by hand ------------------------------------------------------------------------------------------


def jpeg(**options: Any) -> bytes:
    """The picture without chroma subsampling."""
    return encode(picture(), "JPEG", quality=95, subsampling=0, **options)


def _app(number: int, data: bytes) -> bytes:
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(data) + 2) + data


def _jpeg_with(segments: bytes, content: bytes) -> bytes:
    return content[:2] + segments + content[2:]


def _jpeg_ycck() -> bytes:
    """YCCK, as Photoshop writes it: luma and chroma of the inverted inks, and black."""
    wanted = np.asarray(picture(), float)
    red, green, blue = wanted[..., 0], wanted[..., 1], wanted[..., 2]
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    stored = np.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128, np.full_like(luma, 255)], axis=2)
    # Libjpeg turns YCC into 255 - RGB, and Adobe stores inks inverted: what is stored inverts the wanted picture.
    stored[..., 0] = 255 - luma
    stored[..., 1:3] = 256 - stored[..., 1:3]
    inks = Image.fromarray(255 - np.clip(np.rint(stored), 0, 255).astype(np.uint8), "CMYK")
    content = encode(inks, "JPEG", quality=100)
    adobe = content.index(b"Adobe")
    return content[: adobe + 11] + b"\x02" + content[adobe + 12 :]  # the colour transform: YCCK


def _jpeg_of_many_scans() -> bytes:
    content = encode(picture(), "JPEG")
    scan = content.index(b"\xff\xda")
    return content[:scan] + content[scan:-2] * 5000 + content[-2:]


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# How a camera held that way has stored the picture: the inverse of what the number tells the reader to do.
_STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def _stored(orientation: int) -> Image.Image:
    how = _STORED_AS[orientation]
    return picture() if how is None else picture().transpose(how)


# -- other formats by hand ---------------------------------------------------------------------------------


def _bmp_top_down() -> bytes:
    content = bytearray(encode(picture().transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    content[22:26] = struct.pack("<i", -SIDE_PX)
    return bytes(content)


def _bmp_claiming(width: int, height: int) -> bytes:
    content = bytearray(encode(picture(), "BMP"))
    content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def _gif_claiming(width: int, height: int) -> bytes:
    content = bytearray(encode(picture(), "GIF"))
    content[6:10] = struct.pack("<HH", width, height)
    return bytes(content)


def _gif_frame_claiming(width: int, height: int, disposal: int) -> bytes:
    control = b"\x21\xf9\x04" + bytes([disposal << 2]) + b"\0\0\0\0"
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x80, 0, 0) + bytes(6) + control + frame + b"\x3b"


def _webp_claiming(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", 0x10)[:4] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    picture_chunks = encode(picture(), "WEBP")[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + picture_chunks
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("photo.jpg", jpeg())
    return buffer.getvalue()


def _animated(kind: str, **options: Any) -> bytes:
    content = encode(picture(), kind, save_all=True, append_images=[picture((BLACK,) * 4)], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(content))))) == 2
    return content


def _see_through(mode: str) -> Image.Image:
    """The left half opaque, the right half clear over black."""
    image = picture((RED, BLACK, BLUE, BLACK)).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[255] * 16 + [0] * 16], SIDE_PX, axis=0).astype(np.uint8)))
    return image.convert(mode)


_HALF_WHITE = (RED, WHITE, BLUE, WHITE)


# -- the corpus --------------------------------------------------------------------------------------------


def _readable() -> Iterator[Case]:
    png = encode(picture(), "PNG")
    yield Case("png", ".png", png)
    yield Case("png named jpg", ".jpg", png)
    yield Case("jpeg named png", ".PNG", jpeg(), tolerance=6)
    yield Case("jpeg", ".jpg", jpeg(), tolerance=6)
    yield Case("jpeg progressive", ".jpeg", jpeg(progressive=True), tolerance=6)
    yield Case("jpeg subsampled", ".jpg", encode(picture(), "JPEG", quality=95, subsampling=2), tolerance=12)
    yield Case("jpeg with restart markers", ".jpg", jpeg(restart_marker_blocks=1), tolerance=6)
    yield Case("jpeg of rgb without a transform", ".jpg", jpeg(keep_rgb=True), tolerance=6)
    yield Case("jpeg grey", ".jpg", encode(picture().convert("L"), "JPEG", quality=95), None, GREYS, 6)
    yield Case("jpeg cmyk of adobe", ".jpg", encode(picture().convert("CMYK"), "JPEG", quality=100), tolerance=6)
    yield Case("jpeg ycck", ".jpg", _jpeg_ycck(), tolerance=8)
    yield Case("jpeg with garbage behind it", ".jpg", jpeg() + bytes(range(256)) * 40, tolerance=6)
    yield Case("jpeg with a video behind it", ".jpg", jpeg() + b"\xff\xda\x00\x08" * 5000, tolerance=6)
    yield Case("two jpegs in one file", ".jpg", jpeg() + encode(picture((BLACK,) * 4), "JPEG"), tolerance=6)
    yield Case("jpeg with a second picture (mpo)", ".jpg", _animated("MPO", quality=95, subsampling=0), tolerance=6)
    yield Case("jpeg with 200 long app segments", ".jpg", _jpeg_with(_app(5, bytes(60_000)) * 200, jpeg()), tolerance=6)
    yield Case("jpeg with broken exif", ".jpg", _jpeg_with(_app(1, b"Exif\0\0MM\0*\xff\xff"), jpeg()), tolerance=6)
    yield Case("jpeg with exif of noise", ".jpg", _jpeg_with(_app(1, b"Exif\0\0" + b"\xab" * 999), jpeg()), tolerance=6)
    yield Case(
        "jpeg with a broken profile", ".jpg", _jpeg_with(_app(2, b"ICC_PROFILE\0\x01\x01no"), jpeg()), tolerance=6
    )
    for orientation in _STORED_AS:
        content = encode(_stored(orientation), "JPEG", quality=95, subsampling=0, exif=_exif(orientation))
        yield Case(f"jpeg orientation {orientation}", ".jpg", content, tolerance=6)
    for orientation in (0, 9, 65535):
        yield Case(f"jpeg orientation {orientation} means nothing", ".jpg", jpeg(exif=_exif(orientation)), tolerance=6)
    yield Case("png orientation 6", ".png", encode(_stored(6), "PNG", exif=_exif(6)))
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    yield Case("jpeg orientation 3 in xmp", ".jpg", _turned_by_xmp(xmp), tolerance=6)
    yield Case("webp orientation 8", ".webp", encode(_stored(8), "WEBP", lossless=True, exif=_exif(8)))
    yield Case("tiff orientation 5", ".tif", encode(_stored(5), "TIFF", exif=_exif(5)))
    yield Case("png interlaced", ".png", _png_interlaced())
    yield Case("png 16-bit rgb", ".png", _png_sixteen_bit_rgb())
    deep = Image.fromarray(np.asarray(picture(GREYS).convert("L")).astype(np.uint16) * 257)
    yield Case("png 16-bit grey", ".png", encode(deep, "PNG"), None, GREYS)
    yield Case("png grey", ".png", encode(picture(GREYS).convert("L"), "PNG"), None, GREYS)
    yield Case("png 1-bit", ".png", encode(picture((WHITE, BLACK) * 2).convert("1"), "PNG"), None, (WHITE, BLACK) * 2)
    yield Case("png palette", ".png", encode(picture().quantize(4), "PNG"))
    paletted = picture().quantize(4)
    clear = paletted.getpixel((20, 4))
    see_through = encode(paletted, "PNG", transparency=clear)
    yield Case("png palette with transparency", ".png", see_through, None, (RED, WHITE, BLUE, YELLOW))
    yield Case("png rgba", ".png", encode(_see_through("RGBA"), "PNG"), None, _HALF_WHITE)
    greys = (_grey(RED), WHITE, _grey(BLUE), WHITE)
    yield Case("png grey with alpha", ".png", encode(_see_through("LA"), "PNG"), None, greys, 1)
    yield Case(
        "png with a colour key", ".png", encode(picture(), "PNG", transparency=GREEN), None, (RED, WHITE, BLUE, YELLOW)
    )
    yield Case("png animated", ".png", _animated("PNG"))
    text = chunk(b"tEXt", b"Comment\0" + b"x" * 8_000_000)
    yield Case("png with 8 MB of text", ".png", _png_with(text, png))
    yield Case("png with a broken profile", ".png", _png_with(chunk(b"iCCP", b"x\0\0no zlib"), png))
    yield Case("png with an unknown chunk", ".png", _png_with(chunk(b"quAd", b"anything"), png))
    yield Case("png without its end", ".png", _png_without(png, b"IEND"))
    yield Case("png with a wrong checksum of its pixels", ".png", _png_with_wrong_checksum(png, b"IDAT"))
    yield Case("png with garbage behind it", ".png", png + b"<html>" * 100)
    yield Case("png of one pixel", ".png", encode(picture((RED,) * 4, 2).crop((0, 0, 1, 1)), "PNG"), None, (RED,) * 4)
    for size in ((1, 5000), (5000, 1)):
        yield Case(
            f"png {size[0]} x {size[1]}", ".png", encode(Image.new("RGB", size, GREEN), "PNG"), None, (GREEN,) * 4
        )
    yield Case("gif", ".gif", encode(picture().quantize(4), "GIF"))
    yield Case("gif animated", ".gif", _animated("GIF"), tolerance=2)
    yield Case(
        "gif with transparency", ".gif", encode(paletted, "GIF", transparency=clear), None, (RED, WHITE, BLUE, YELLOW)
    )
    yield Case("webp", ".webp", encode(picture(), "WEBP", quality=100), tolerance=12)
    yield Case("webp lossless", ".webp", encode(picture(), "WEBP", lossless=True))
    yield Case("webp animated", ".webp", _animated("WEBP", lossless=True))
    yield Case("webp with alpha", ".webp", encode(_see_through("RGBA"), "WEBP", lossless=True), None, _HALF_WHITE)
    yield Case("bmp", ".bmp", encode(picture(), "BMP"))
    yield Case("bmp top-down", ".bmp", _bmp_top_down())
    yield Case("bmp palette", ".bmp", encode(picture().quantize(4), "BMP"))
    yield Case("tiff", ".tif", encode(picture(), "TIFF"))
    yield Case("tiff lzw", ".tiff", encode(picture(), "TIFF", compression="tiff_lzw"))
    yield Case("tiff deflate", ".tiff", encode(picture(), "TIFF", compression="tiff_adobe_deflate"))
    yield Case("tiff of jpeg", ".tiff", encode(picture(), "TIFF", compression="jpeg", quality=95), tolerance=16)
    yield Case("tiff of many pages", ".tiff", _animated("TIFF"))
    yield Case("tiff tiled", ".tiff", _tiff_tiled())
    yield Case("tiff cmyk", ".tiff", encode(picture().convert("CMYK"), "TIFF"))
    yield Case("tiff 16-bit grey", ".tiff", encode(deep, "TIFF"), None, GREYS)
    yield Case("tiff 16-bit rgb", ".tiff", _tiff_sixteen_bit_rgb("<"))
    yield Case("tiff 16-bit rgb big-endian", ".tiff", _tiff_sixteen_bit_rgb(">"))


def _turned_by_xmp(xmp: bytes) -> bytes:
    content = encode(_stored(3), "JPEG", quality=95, subsampling=0)
    return _jpeg_with(_app(1, b"http://ns.adobe.com/xap/1.0/\0" + xmp), content)


def _truncated() -> Iterator[Case]:
    whole: dict[str, tuple[str, bytes, tuple[float, ...]]] = {
        "jpeg": (".jpg", jpeg(), (0.01, 0.2, 0.6, 0.9)),
        "jpeg progressive": (".jpg", jpeg(progressive=True), (0.3, 0.6)),
        "png": (".png", encode(noise(), "PNG"), (0.004, 0.3, 0.9)),
        "gif": (".gif", encode(noise(), "GIF"), (0.002, 0.5, 0.9)),
        "webp": (".webp", encode(noise(), "WEBP"), (0.02, 0.5, 0.9)),
        "bmp": (".bmp", encode(noise(), "BMP"), (0.004, 0.5, 0.9)),
        "tiff": (".tiff", encode(noise(), "TIFF"), (0.002, 0.5, 0.9)),
        "tiff lzw": (".tiff", encode(noise(), "TIFF", compression="tiff_lzw"), (0.5,)),
    }
    for kind, (suffix, content, shares) in whole.items():
        for share in shares:
            yield Case(f"{kind} cut at {share:g}", suffix, _cut(content, share), "truncated")
    yield Case("jpeg without its end marker", ".jpg", jpeg()[:-2], "truncated")
    yield Case("jpeg of noise behind its first bytes", ".jpg", b"\xff\xd8\xff\xe0" + _noise_bytes(), "truncated")
    yield Case("empty file", ".jpg", b"", "truncated")


def noise() -> Image.Image:
    """A picture that does not compress, so that a cut always hits pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3)).astype(np.uint8))


def _unreadable() -> Iterator[Case]:
    png = encode(picture(), "PNG")
    yield Case("png of damaged pixels", ".png", _png_with_damaged_pixels(), "unreadable")
    yield Case("png with a wrong checksum of its header", ".png", _png_with_wrong_checksum(png, b"IHDR"), "unreadable")
    yield Case("png without pixels", ".png", _png_without(png, b"IDAT"), "unreadable")
    bomb = zlib.compress(bytes(200_000_000), 9)
    yield Case(
        "png with a text that inflates to 200 MB", ".png", _png_with(chunk(b"zTXt", b"x\0\0" + bomb), png), "unreadable"
    )
    yield Case(
        "png with a profile that inflates to 200 MB",
        ".png",
        _png_with(chunk(b"iCCP", b"x\0\0" + bomb), png),
        "unreadable",
    )
    yield Case("gif without a frame", ".gif", encode(picture(), "GIF")[:13] + b";", "unreadable")
    yield Case("png of no width", ".png", png_by_hand(0, 8, 8, 2, b""), "unreadable")
    yield Case("jpeg of damaged tables", ".jpg", _jpeg_with_damaged_tables(), "unreadable")
    yield Case("webp of damaged pixels", ".webp", _webp_with_damaged_pixels(), "unreadable")


def _noise_bytes() -> bytes:
    return np.random.default_rng(1).integers(0, 256, 5000).astype(np.uint8).tobytes()


def _png_with_damaged_pixels() -> bytes:
    pixels = bytearray(zlib.compress(_noise_bytes()))
    pixels[20:40] = bytes(20)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 48, 34, 8, 2, 0, 0, 0))
    return PNG_MAGIC + header + chunk(b"IDAT", b"\x78\x9c\xff" + bytes(pixels)) + chunk(b"IEND", b"")


def _jpeg_with_damaged_tables() -> bytes:
    content = jpeg()
    table = content.index(b"\xff\xc4")
    return content[: table + 5] + b"\xff" * 16 + content[table + 21 :]


def _webp_with_damaged_pixels() -> bytes:
    content = bytearray(encode(noise(), "WEBP", lossless=True))
    content[25:200] = b"\xff" * 175
    return bytes(content)


def _foreign() -> Iterator[Case]:
    contents: dict[str, tuple[str, bytes]] = {
        "zeros": (".png", bytes(5000)),
        "html in a jpg": (".jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
        "text": (".jpg", b"This image has been removed.\n"),
        "json": (".png", b'{"error": "no such key"}'),
        "xml of a store": (".jpg", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        "pdf": (".jpg", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n"),
        "svg": (".png", b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="9"/></svg>'),
        "zip": (".jpg", _zip()),
        "gzip": (".jpg", gzip.compress(jpeg())),
        "postscript": (".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "netpbm": (".png", encode(picture(), "PPM")),
        "icon": (".png", encode(picture(), "ICO")),
        "git lfs pointer": (".jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"),
    }
    for name, (suffix, content) in contents.items():
        yield Case(name, suffix, content, "not_an_image")
    others: dict[str, bytes] = {
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "avif": encode(picture(), "AVIF"),
        "jpeg 2000": encode(picture(), "JPEG2000"),
        "jpeg 2000 codestream": encode(picture(), "JPEG2000", no_jp2=True),
        "jpeg xl": b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(64),
        "jpeg xl codestream": b"\xff\x0a" + bytes(64),
        "photoshop": b"8BPS\0\x01" + bytes(64),
    }
    for name, content in others.items():
        yield Case(name, ".jpg", content, "unsupported")
    yield Case("jpeg of 5000 scans", ".jpg", _jpeg_of_many_scans(), "unsupported")


def _too_large() -> Iterator[Case]:
    yield Case("png claiming 60000 x 60000", ".png", png_by_hand(60_000, 60_000, 8, 2, bytes(999)), "too_large")
    yield Case("png claiming 2^31 x 2^31", ".png", png_by_hand(2**31 - 1, 2**31 - 1, 8, 2, b""), "too_large")
    yield Case("png of 8000 x 8000 zeros", ".png", encode(Image.new("1", (8000, 8000)), "PNG"), "too_large")
    yield Case("gif of a huge canvas", ".gif", _gif_claiming(65_535, 65_535), "too_large")
    for disposal in (0, 2, 3):
        content = _gif_frame_claiming(60_000, 60_000, disposal)
        yield Case(f"gif of a huge frame, disposal {disposal}", ".gif", content, "too_large")
    yield Case("tiff claiming 60000 x 60000", ".tif", _tiff_claiming(60_000, 60_000), "too_large")
    yield Case("tiff claiming 10^6 x 10^6", ".tif", _tiff_claiming(10**6, 10**6), "too_large")
    yield Case("tiff of a huge tile", ".tif", _tiff_with_a_huge_tile(), "too_large")
    yield Case("bmp claiming 60000 x 60000", ".bmp", _bmp_claiming(60_000, 60_000), "too_large")
    yield Case("webp claiming 16383 x 16383", ".webp", _webp_claiming(16_383, 16_383), "too_large")
    yield Case("jpeg claiming 65000 x 65000", ".jpg", _jpeg_claiming(65_000, 65_000), "too_large")
    yield Case(
        "png of 33 MB",
        ".png",
        _png_with(chunk(b"tEXt", b"x\0" + bytes(33 * 2**20)), encode(picture(), "PNG")),
        "too_large",
    )


def _jpeg_claiming(width: int, height: int) -> bytes:
    content = jpeg()
    frame = content.index(b"\xff\xc0")
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


_PARTS: tuple[Callable[[], Iterator[Case]], ...] = (_readable, _truncated, _unreadable, _foreign, _too_large)


def corpus() -> list[Case]:
    """Every case, in a fixed order; names are distinct."""
    return [case for part in _PARTS for case in part()]
