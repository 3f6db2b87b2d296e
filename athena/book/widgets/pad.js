// A square to draw a digit in, with mouse, finger or pen: 28 by 28 cells, each as bright as it was gone over.
const CELLS = 28;
const SIDE = 224;

function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE;
  canvas.style.cssText = "background: black; border: 1px solid gray; touch-action: none; cursor: crosshair";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Draw a digit here");
  const clear = document.createElement("button");
  clear.textContent = "Clear";
  clear.className = "jupyter-button";
  clear.style.display = "block";
  el.append(canvas, clear);

  const context = canvas.getContext("2d");
  const small = document.createElement("canvas");
  small.width = small.height = CELLS;
  const reduced = small.getContext("2d", { willReadFrequently: true });
  let last = null;

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * SIDE) / box.width, ((event.clientY - box.top) * SIDE) / box.height];
  };
  const send = () => {
    reduced.drawImage(canvas, 0, 0, CELLS, CELLS);
    const pixels = reduced.getImageData(0, 0, CELLS, CELLS).data;
    model.set("strokes", Array.from({ length: CELLS * CELLS }, (_, i) => pixels[4 * i] / 255));
    model.save_changes();
  };
  const wipe = () => {
    context.fillStyle = "black";
    context.fillRect(0, 0, SIDE, SIDE);
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const next = place(event);
    context.strokeStyle = "white";
    context.lineWidth = SIDE / 12;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...next);
    context.stroke();
    last = next;
  });
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, () => {
      if (last) send();
      last = null;
    });
  }
  clear.addEventListener("click", () => {
    wipe();
    model.set("strokes", []);
    model.save_changes();
  });
  wipe();
}

export default { render };
