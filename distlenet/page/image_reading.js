// Read decoded images as distlenet.images does: the same bytes for the same pixels. Chromium decodes files to the pixels
// of Pillow, except 16-bit PNG, which it rounds to 8 bits: a byte can differ by a level. Another browser may differ in
// JPEG, half transparent pixels and CMYK.
// An image is {width, height, channels, data}; data holds its rows, with the channels of a pixel together.

import { BICUBIC, BILINEAR, BOX, resize } from "./resampling.js";

const grey = (r, g, b) => (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // Pillow's conversion to mode L

// Return pixels {width, height, data: RGBA} as the network's input, for the format in the model's metadata.
export function readImage(pixels, invert, format) {
  let image = toChannels(pixels, format.channels);
  let border = borderMedian(image);
  const light = format.channels === 1 && border[0] > 127;
  if (invert === "yes" || (invert === "auto" && light && format.dark_border)) {
    image = { ...image, data: image.data.map((value) => 255 - value) };
    border = border.map((value) => 255 - value);
  }
  const [height, width] = format.size;
  if (image.width === width && image.height === height) return image;
  if (format.resized) return resize(image, width, height, BILINEAR);
  const scale = Math.max(image.width / width, image.height / height); // pixels of the file per pixel of the result
  const padded = pad(
    image,
    Math.max(image.width, roundHalfToEven(width * scale)),
    Math.max(image.height, roundHalfToEven(height * scale)),
    border,
  );
  return resize(padded, width, height, scale >= 1 ? BOX : BICUBIC);
}

// Return the bytes as the network expects them: (H, W), or (3, H, W).
export function toPlanes({ channels, data }) {
  const size = data.length / channels;
  return Uint8Array.from(data, (_, index) => data[(index % size) * channels + Math.floor(index / size)]);
}

// Transparent pixels become white, or black if the visible ones are light.
function toChannels({ width, height, data: rgba }, channels) {
  let sum = 0, opacity = 0;
  for (let i = 0; i < rgba.length; i += 4) {
    sum += grey(rgba[i], rgba[i + 1], rgba[i + 2]) * rgba[i + 3];
    opacity += rgba[i + 3];
  }
  const background = opacity > 0 && sum / opacity > 127 ? 0 : 255;
  const data = new Uint8Array(width * height * channels);
  for (let i = 0, to = 0; i < rgba.length; i += 4, to += channels) {
    const r = blend(rgba[i], rgba[i + 3], background);
    const g = blend(rgba[i + 1], rgba[i + 3], background);
    const b = blend(rgba[i + 2], rgba[i + 3], background);
    data[to] = channels === 1 ? grey(r, g, b) : r;
    if (channels === 3) [data[to + 1], data[to + 2]] = [g, b];
  }
  return { width, height, channels, data };
}

// Pillow's alpha_composite on an opaque background: divisions by 255 are rounded, with 7 more bits.
function blend(value, alpha, background) {
  if (alpha === 255) return value;
  const sum = (value * alpha + background * (255 - alpha)) * 128 + 0x80 * 128;
  return (((sum >> 8) + sum) >> 8) >> 7;
}

// Return the median of the pixels of the border, per channel; corners count twice.
function borderMedian({ width, height, channels, data }) {
  return Array.from({ length: channels }, (_, channel) => {
    const values = [];
    const add = (x, y) => values.push(data[(y * width + x) * channels + channel]);
    for (let x = 0; x < width; x++) for (const y of [0, height - 1]) add(x, y);
    for (let y = 0; y < height; y++) for (const x of [0, width - 1]) add(x, y);
    values.sort((a, b) => a - b);
    const middle = values.length / 2; // their number is even
    return Math.trunc((values[middle - 1] + values[middle]) / 2);
  });
}

function roundHalfToEven(value) {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
}

// Put an image in the middle of one of that size and color.
function pad(image, width, height, color) {
  const { channels } = image;
  const data = new Uint8Array(width * height * channels);
  for (let i = 0; i < data.length; i++) data[i] = color[i % channels];
  const left = Math.floor((width - image.width) / 2), top = Math.floor((height - image.height) / 2);
  const row = image.width * channels;
  for (let y = 0; y < image.height; y++) {
    data.set(image.data.subarray(y * row, (y + 1) * row), ((y + top) * width + left) * channels);
  }
  return { width, height, channels, data };
}
