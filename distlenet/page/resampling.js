// Resize images as Pillow's Image.resize does, in the same integers: the network then receives the same bytes as in
// `distlenet predict`. A pixel of the result is a weighted mean of pixels of the source. The weights are computed in
// doubles, and rounded to integers in units of 2 ** -22. One axis is resized after the other; each result is rounded
// to 8 bits, so the order counts. This is the order of Pillow 13; earlier versions always begin with the width.

const BITS = 22;
const HALF = 2 ** (BITS - 1);

export const BOX = { support: 0.5, weight: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) };

export const BILINEAR = { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) };

export const BICUBIC = {
  support: 2,
  weight(x) {
    const a = -0.5;
    x = Math.abs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  },
};

// Return, for each pixel of the result, the first pixel of the source and the weights from there.
function weightsOf(from, to, filter) {
  const scale = from / to;
  const stretch = Math.max(scale, 1); // a smaller result: the filter covers more pixels, which is the antialiasing
  const support = filter.support * stretch;
  return Array.from({ length: to }, (_, index) => {
    const center = (index + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const end = Math.min(from, Math.trunc(center + support + 0.5));
    const inverse = 1 / stretch;
    const weights = Array.from({ length: end - first }, (_, k) => filter.weight((k + first - center + 0.5) * inverse));
    const sum = weights.reduce((a, b) => a + b, 0);
    const units = weights.map((weight) => (sum === 0 ? weight : weight / sum) * 2 ** BITS);
    return { first, weights: Int32Array.from(units, (value) => Math.trunc(value < 0 ? value - 0.5 : value + 0.5)) };
  });
}

// Resize along one axis: `lines` lines of `from` pixels; `step` bytes from pixel to pixel, `next` from line to line.
function resample(source, from, to, filter, lines, before, after, channels) {
  const result = new Uint8ClampedArray(lines * to * channels);
  weightsOf(from, to, filter).forEach(({ first, weights }, index) => {
    for (let line = 0; line < lines; line++) {
      for (let channel = 0; channel < channels; channel++) {
        let position = line * before.next + first * before.step + channel;
        let sum = HALF;
        for (const weight of weights) {
          sum += source[position] * weight;
          position += before.step;
        }
        result[line * after.next + index * after.step + channel] = sum >> BITS; // clamped to 0 and 255
      }
    }
  });
  return result;
}

// Resize an image {width, height, channels, data}; data holds its rows, with the channels of a pixel together.
export function resize(image, width, height, filter) {
  const lost = { width: image.width - width, height: image.height - height };
  const tall = lost.height > 0 && lost.height > 2 * lost.width;
  return tall
    ? resizeWidth(resizeHeight(image, height, filter), width, filter)
    : resizeHeight(resizeWidth(image, width, filter), height, filter);
}

function resizeWidth(image, width, filter) {
  if (width === image.width) return image;
  const { height, channels } = image;
  const [before, after] = [image.width, width].map((side) => ({ step: channels, next: side * channels }));
  return { ...image, width, data: resample(image.data, image.width, width, filter, height, before, after, channels) };
}

function resizeHeight(image, height, filter) {
  if (height === image.height) return image;
  const { width, channels } = image;
  const layout = { step: width * channels, next: channels };
  return { ...image, height, data: resample(image.data, image.height, height, filter, width, layout, layout, channels) };
}
