// A drawing area: black lines on white paper, by mouse, finger, pen or keyboard.

const STEP = 14; // pixels of the canvas per press of an arrow key
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Call `finished` after each line. Return {clear, toFile}.
export function makeDrawing(canvas, pen, brush, finished) {
  const context = canvas.getContext("2d");
  const position = { x: canvas.width / 2, y: canvas.height / 2 }; // of the keyboard's pen
  let pointer = null, last = null, byKeyboard = false;

  function clear() {
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.width, canvas.height);
    byKeyboard = false;
  }

  function line(from, to) {
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = Number(brush.value);
    context.beginPath();
    context.moveTo(from.x, from.y);
    context.lineTo(to.x, to.y);
    context.stroke();
  }

  function place({ clientX, clientY }) {
    const box = canvas.getBoundingClientRect();
    return { x: ((clientX - box.left) * canvas.width) / box.width, y: ((clientY - box.top) * canvas.height) / box.height };
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (pointer !== null || event.button !== 0) return; // one finger draws; others are ignored
    pointer = event.pointerId;
    canvas.setPointerCapture(pointer);
    last = place(event);
    line(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (event.pointerId !== pointer) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) {
      const next = place(each);
      line(last, next);
      last = next;
    }
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      if (event.pointerId !== pointer) return;
      pointer = null;
      finished();
    });
  }

  // End a line that was drawn with the keyboard.
  function finishByKeyboard() {
    if (!byKeyboard) return;
    byKeyboard = false;
    finished();
  }

  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Delete" || event.key === "Backspace") canvas.dispatchEvent(new Event("clear"));
    if (!(event.key in ARROWS)) return;
    event.preventDefault(); // no scrolling
    const [dx, dy] = ARROWS[event.key];
    const before = { ...position };
    position.x = Math.min(canvas.width, Math.max(0, position.x + dx * STEP));
    position.y = Math.min(canvas.height, Math.max(0, position.y + dy * STEP));
    pen.hidden = false;
    pen.style.left = `${(100 * position.x) / canvas.width}%`;
    pen.style.top = `${(100 * position.y) / canvas.height}%`;
    if (event.shiftKey) {
      line(before, position);
      byKeyboard = true;
    }
  });
  canvas.addEventListener("keyup", (event) => {
    if (event.key === "Shift") finishByKeyboard();
  });
  canvas.addEventListener("blur", () => {
    pen.hidden = true;
    finishByKeyboard(); // Shift+Tab moves the focus before Shift is released
  });

  clear();
  return {
    clear,
    toFile: async () => {
      const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
      return new File([blob], "drawing.png", { type: "image/png" });
    },
  };
}
