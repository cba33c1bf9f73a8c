// Decode image files with the browser.

const MAX_PIXELS = 50_000_000; // the limits of distlenet.images
const MAX_SIDE = 16_384;
const STRIP_PIXELS = 4_000_000; // some browsers limit the area of a canvas to 16 million

export class UserError extends Error {}

// Return an ImageBitmap with the values as stored: no color profile is applied, but the EXIF orientation is.
export async function decodeFile(file) {
  const asStored = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, asStored);
  } catch {
    const name = file.name || "The data";
    throw new UserError(`${name} is not an image that this browser can read. Use a PNG, JPEG, WebP, GIF or BMP file.`);
  }
  const { width, height } = bitmap;
  if (Math.max(width, height) > MAX_SIDE || width * height > MAX_PIXELS) {
    bitmap.close();
    throw new UserError(
      `The image has ${width} × ${height} pixels. At most ${MAX_PIXELS / 1e6} million pixels, and ` +
        `${MAX_SIDE} per side, are possible: scale it down.`,
    );
  }
  return bitmap;
}

// Return the pixels of a bitmap, {width, height, data: RGBA}.
export function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  const data = new Uint8ClampedArray(width * height * 4);
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.min(height, Math.ceil(STRIP_PIXELS / width));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";
  for (let y = 0; y < height; y += canvas.height) {
    const rows = Math.min(canvas.height, height - y);
    context.drawImage(bitmap, 0, -y);
    data.set(context.getImageData(0, 0, width, rows).data, y * width * 4);
  }
  return { width, height, data };
}
