// What answers: the server that delivers this page, or a network in this page.
// predict(file, {top, invert, signal}), where top is the number of classes to return, or null, returns {top: [{class, label, probability}], seen, milliseconds}; `seen` is an
// ImageBitmap or ImageData of what the network got.

import { decodeFile, pixelsOf, UserError } from "./image_decoding.js";
import { readImage, toPlanes } from "./image_reading.js";

export class TokenNeeded extends Error {}

// Return the backend that page.json names, ready to predict.
export async function openBackend() {
  const settings = await fetchJson("page.json");
  return settings.backend === "web" ? WebBackend.load(settings) : new ServerBackend(settings);
}

async function fetchFile(name) {
  let response;
  try {
    response = await fetch(name);
  } catch {
    throw new UserError(`${name} cannot be loaded: there is no answer. Check the connection, and load the page again.`);
  }
  if (!response.ok) throw new UserError(`${name} cannot be loaded: status ${response.status}. Load the page again.`);
  return response;
}

const fetchJson = async (name) => (await fetchFile(name)).json();

class ServerBackend {
  constructor({ name, classes }) {
    this.name = name;
    this.classes = classes;
    this.about = "The server that delivers this page runs the network.";
    this.where = "to the server and back";
    this.token = "";
  }

  async predict(file, { top, invert, signal }) {
    const headers = { "Content-Type": file.type || "application/octet-stream" };
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    const query = new URLSearchParams({ invert, seen: 1, ...(top && { top }) }); // by default at most 3 classes
    const start = performance.now();
    let response;
    try {
      response = await fetch(`predict?${query}`, { method: "POST", headers, body: file, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new UserError("The server does not answer. Check that it runs, and give the image again.");
    }
    if (response.status === 401) throw new TokenNeeded(this.token ? "The server does not accept this token." : "");
    const answer = await response.json().catch(() => ({}));
    const milliseconds = performance.now() - start;
    if (!response.ok) throw new UserError(explain(response.status, answer.error));
    return { top: answer.top, seen: await bitmapOf(answer.seen), milliseconds };
  }
}

function explain(status, reason) {
  if (status === 413) return `The file is too large for this server${reason ? `: ${reason}` : ""}.`;
  if (status === 429 || status === 503) return "The server is busy. Give the image again in a moment.";
  return reason ? reason.replace(/^image: /, "The image ") : `The server answers with status ${status}.`;
}

// Return the image of a PNG in base64, without a request.
async function bitmapOf(base64) {
  return createImageBitmap(new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))]));
}

class WebBackend {
  static async load({ model, metadata, runtime }) {
    const backend = new WebBackend();
    backend.metadata = await fetchJson(metadata);
    const bytes = new Uint8Array(await (await fetchFile(model)).arrayBuffer());
    backend.ort = await import(new URL(`${runtime}ort.wasm.bundle.min.mjs`, document.baseURI));
    backend.ort.env.wasm.numThreads = 1; // more need headers that a static host does not send
    backend.ort.env.wasm.wasmPaths = { wasm: new URL(`${runtime}ort-wasm-simd-threaded.wasm`, document.baseURI).href };
    backend.session = await backend.ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
    backend.name = backend.metadata.name;
    backend.classes = backend.metadata.classes;
    backend.about = "The network runs in this browser: no image leaves this device.";
    backend.where = "in this browser";
    const { channels, size } = backend.metadata.images;
    await backend.run(new Uint8Array(channels * size[0] * size[1])); // the first run is slower
    return backend;
  }

  async predict(file, { top, invert, signal }) {
    const start = performance.now();
    const bitmap = await decodeFile(file);
    const image = readImage(pixelsOf(bitmap), invert, this.metadata.images);
    bitmap.close();
    signal.throwIfAborted();
    const probabilities = await this.run(toPlanes(image));
    const milliseconds = performance.now() - start;
    const labels = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]).slice(0, top ?? 3);
    const { classes } = this.metadata;
    const predictions = labels.map((label) => ({
      class: classes ? classes[label] : String(label), label, probability: probabilities[label],
    }));
    return { top: predictions, seen: imageData(image), milliseconds };
  }

  async run(planes) {
    const { channels, size } = this.metadata.images;
    const [[name, { dtype }]] = Object.entries(this.metadata.inputs);
    const shape = channels === 1 ? [1, ...size] : [1, channels, ...size];
    const values = dtype === "uint8" ? planes : Float32Array.from(planes);
    const outputs = await this.session.run({ [name]: new this.ort.Tensor(dtype, values, shape) }, ["predictions"]);
    return outputs.predictions.data;
  }
}

function imageData({ width, height, channels, data }) {
  const rgba = new Uint8ClampedArray(width * height * 4).fill(255);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let c = 0; c < 3; c++) rgba[pixel * 4 + c] = data[pixel * channels + (channels === 1 ? 0 : c)];
  }
  return new ImageData(rgba, width, height);
}
