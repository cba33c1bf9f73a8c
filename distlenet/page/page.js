// The page: it takes an image or a drawing, sends it to the backend, and shows the answer.

import { openBackend, TokenNeeded } from "./backend.js";
import { makeDrawing } from "./drawing.js";
import { decodeFile, UserError } from "./image_decoding.js";

const TOP = 5; // classes in an answer
const NAMED = 12; // classes that the head of the page names
const element = (id) => document.getElementById(id);
const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

let backend, drawing;
let lastFile = null; // classified again after a change of the settings, or with a token
let isDrawing = false; // whether the newest request is for the drawing, which can be cleared
let request = null; // the AbortController of the newest request; older answers are dropped

// Classify a file, or the file that a promise resolves to.
async function classify(source, drawn = isDrawing) {
  request?.abort();
  isDrawing = drawn;
  const current = (request = new AbortController());
  element("answers").ariaBusy = "true"; // dims the old answer; a screen reader waits for the new one
  try {
    const file = await source;
    if (current !== request) return;
    lastFile = file;
    const settings = { top: backend.classes && Math.min(TOP, backend.classes.length), invert: element("invert").value, signal: current.signal };
    const [answer, preview] = await Promise.all([backend.predict(file, settings), decodeFile(file).catch(() => null)]);
    if (current === request) show(answer, file, preview);
  } catch (error) {
    if (current === request) showError(error);
  }
}

function show({ top, seen, milliseconds }, file, preview) {
  hideAnswer();
  element("token-form").hidden = true;
  element("answer").textContent = `${top[0].class}, ${percent(top[0].probability)}`;
  element("classes").replaceChildren(...top.map(classRow));
  draw(element("seen"), seen, seen.width, seen.height);
  element("seen-size").textContent = `${seen.width} × ${seen.height} pixels`;
  element("preview-name").textContent = file.name || "pasted image";
  showPreview(preview);
  element("latency").textContent = `Answer after ${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms ${backend.where}`;
  element("empty").hidden = true;
  element("result").hidden = false;
}

function showClasses(classes) {
  const more = classes.length > NAMED ? `, and ${classes.length - NAMED} more` : "";
  element("known").textContent = `Classes: ${classes.slice(0, NAMED).join(", ")}${more}`;
  element("known").hidden = false;
}

function classRow({ class: name, probability }) {
  const make = (tag, className, text = "") => Object.assign(document.createElement(tag), { className, textContent: text });
  const bar = make("span", "bar"), text = make("span", "text");
  bar.style.width = `${100 * probability}%`;
  text.append(make("span", "name", name), make("span", "value", percent(probability)));
  const row = document.createElement("li");
  row.append(bar, text);
  return row;
}

function showPreview(bitmap) {
  const canvas = element("preview");
  canvas.parentElement.hidden = bitmap === null; // the server reads some formats that the browser does not
  if (bitmap === null) return;
  const scale = Math.min(1, 352 / Math.max(bitmap.width, bitmap.height));
  canvas.classList.toggle("small", Math.max(bitmap.width, bitmap.height) < 100);
  draw(canvas, bitmap, Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  bitmap.close();
}

function draw(canvas, image, width, height) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  if (image instanceof ImageData) context.putImageData(image, 0, 0);
  else context.drawImage(image, 0, 0, width, height);
}

function hideAnswer() {
  element("answer").textContent = "";
  element("answers").ariaBusy = "false";
  element("error").hidden = true;
  element("result").hidden = true;
  element("empty").hidden = false;
}

function showError(error) {
  hideAnswer();
  element("empty").hidden = true;
  if (error instanceof TokenNeeded) {
    element("token-form").hidden = false;
    element("token").focus();
    if (!error.message) return;
  } else if (!(error instanceof UserError)) {
    console.error(error);
  }
  element("error").textContent = error.message;
  element("error").hidden = false;
}

function takeFile(files) {
  if (!backend) return;
  if (files.length) classify(files[0], false);
  else showError(new UserError("This is not a file. Save the image first, and choose or drop the file."));
}

function listen() {
  for (const id of ["file", "camera"]) {
    element(id).addEventListener("change", ({ target }) => {
      if (target.files.length) takeFile(target.files);
      target.value = ""; // the same file can be chosen again
    });
    element(id).disabled = false;
  }
  document.addEventListener("paste", (event) => {
    if (event.target.id !== "token") takeFile(event.clipboardData.files);
  });
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault(); // the browser would open the file
      element("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
      if (name === "drop") takeFile(event.dataTransfer.files);
    });
  }
  for (const mode of ["file", "drawing"]) {
    element(`mode-${mode}`).addEventListener("change", () => {
      element("file-panel").hidden = mode !== "file";
      element("drawing-panel").hidden = mode !== "drawing";
    });
  }
  element("invert").addEventListener("change", () => lastFile && classify(lastFile));
  element("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    backend.token = element("token").value.trim();
    element("token").value = "";
    if (lastFile) classify(lastFile);
  });
  drawing = makeDrawing(element("drawing"), element("pen"), element("brush"), () => classify(drawing.toFile(), true));
  const clear = () => {
    drawing.clear();
    if (!isDrawing) return;
    request?.abort();
    request = lastFile = null;
    hideAnswer();
  };
  element("clear").addEventListener("click", clear);
  element("drawing").addEventListener("clear", clear);
}

try {
  backend = await openBackend();
  if (backend.name) element("title").textContent = document.title = backend.name;
  element("about").textContent = backend.about;
  if (backend.classes) showClasses(backend.classes);
  listen();
} catch (error) {
  element("about").textContent = "The network cannot be loaded.";
  showError(error);
}
