// What the lab draws: its curves, digits and heat maps, and the square that a reader draws in.
const labDrawing = (() => {
  "use strict";

  const SIDE = 16; // pixels of a digit
  const PAD = 160; // pixels of the square to draw in

  // Curves in an SVG: the look is that of lab.css, so that it follows light and dark.
  function chart(svg, points, epochs) {
    const [width, height, left, bottom, top, right] = [480, 250, 44, 46, 12, 14];
    const x = (epoch) => left + ((width - left - right) * epoch) / epochs;
    const y = (share) => top + (height - top - bottom) * (1 - share);
    const line = (pick, kind) => {
      const known = points.filter((point) => pick(point) !== null);
      const path = known.map((point) => `${x(point.epoch).toFixed(1)},${y(pick(point)).toFixed(1)}`).join(" ");
      return `<polyline class="${kind}" points="${path}"/>`;
    };
    const shares = [0, 0.25, 0.5, 0.75, 1];
    const rules = shares.map((s) => `<line class="rule" x1="${left}" x2="${width - right}" y1="${y(s)}" y2="${y(s)}"/>
      <text x="${left - 6}" y="${y(s) + 5}" text-anchor="end">${100 * s}</text>`);
    const ticks = [0, 1, 2, 3, 4].map((quarter) => (quarter * epochs) / 4).map((e) => `<text x="${x(e)}" y="${height - 26}" text-anchor="middle">${e}</text>`);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.innerHTML = `${rules.join("")}${ticks.join("")}
      <text x="${(left + width) / 2}" y="${height - 5}" text-anchor="middle">epochs</text>
      ${line((p) => p.train[0], "plain thin")}${line((p) => p.train[1], "guided thin")}
      ${line((p) => p.test[0], "plain")}${line((p) => p.test[1], "guided")}`;
  }

  // Pixels between 0 and 1 in grey, or relevance in red (for) and blue (against), white at 0, by its largest magnitude.
  function paint(canvas, values, isRelevance) {
    const context = canvas.getContext("2d");
    const picture = context.createImageData(SIDE, SIDE);
    const most = isRelevance ? values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-300) : 1;
    values.forEach((value, i) => {
      const v = value / most;
      const fade = Math.round(255 * (1 - Math.abs(v)));
      const colour = !isRelevance ? [255 * v, 255 * v, 255 * v] : v > 0 ? [255 - (255 - fade) * 0.2, fade, fade] : [fade, fade, 255 - (255 - fade) * 0.2];
      picture.data.set([...colour, 255], 4 * i);
    });
    context.putImageData(picture, 0, 0);
  }

  // A drawing as the digits of MNIST are: its ink in a box of 10 x 10 pixels, its centre of mass in the middle.
  function asDigit(drawing) {
    const ink = drawing.getContext("2d").getImageData(0, 0, PAD, PAD).data;
    let [left, top, right, bottom, mass, mx, my] = [PAD, PAD, -1, -1, 0, 0, 0];
    for (let i = 0; i < PAD * PAD; i++) {
      const [value, x, y] = [ink[4 * i], i % PAD, Math.floor(i / PAD)];
      if (value < 32) continue;
      [left, right, top, bottom] = [Math.min(left, x), Math.max(right, x), Math.min(top, y), Math.max(bottom, y)];
      [mass, mx, my] = [mass + value, mx + value * (x + 0.5), my + value * (y + 0.5)];
    }
    if (mass === 0) return null;
    const size = Math.max(right - left, bottom - top) + 1;
    const scale = 10 / size;
    const fine = 8; // drawn larger and averaged, as smoothing alone would leave gaps
    const large = document.createElement("canvas");
    large.width = large.height = SIDE * fine;
    const context = large.getContext("2d", { willReadFrequently: true });
    context.setTransform(scale * fine, 0, 0, scale * fine, (SIDE / 2 - (mx / mass) * scale) * fine, (SIDE / 2 - (my / mass) * scale) * fine);
    context.drawImage(drawing, 0, 0);
    const pixels = context.getImageData(0, 0, SIDE * fine, SIDE * fine).data;
    const digit = new Float64Array(SIDE * SIDE);
    for (let i = 0; i < (SIDE * fine) ** 2; i++) {
      const [x, y] = [i % (SIDE * fine), Math.floor(i / (SIDE * fine))];
      digit[Math.floor(y / fine) * SIDE + Math.floor(x / fine)] += pixels[4 * i] / 255 / fine ** 2;
    }
    return digit;
  }

  // A square to draw in: with mouse, finger or pen, or with the arrow keys, where the space bar lifts and lowers the pen.
  function pad(canvas, changed) {
    const context = canvas.getContext("2d", { willReadFrequently: true });
    let last = null;
    let pen = [PAD / 2, PAD / 2];
    let down = false;
    const clear = () => {
      context.fillStyle = "black";
      context.fillRect(0, 0, PAD, PAD);
      [pen, down] = [[PAD / 2, PAD / 2], false];
    };
    const stroke = (from, to) => {
      context.strokeStyle = "white";
      context.lineWidth = PAD / 11;
      context.lineCap = "round";
      context.beginPath();
      context.moveTo(...from);
      context.lineTo(...to);
      context.stroke();
    };
    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * PAD) / box.width, ((event.clientY - box.top) * PAD) / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      last = place(event);
      stroke(last, last);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const next = place(event);
      stroke(last, next);
      last = next;
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => {
        if (last) changed();
        last = null;
      });
    }
    canvas.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === " ") down = !down;
      else if (!way) return;
      event.preventDefault();
      const next = way ? pen.map((at, axis) => Math.min(PAD - 12, Math.max(12, at + 8 * way[axis]))) : pen;
      if (down) {
        stroke(pen, next);
        changed();
      }
      pen = next;
      canvas.setAttribute("aria-label", `Square to draw a digit in. Pen ${down ? "down" : "up"}, column ${Math.round(pen[0] / 8)} of 20, row ${Math.round(pen[1] / 8)} of 20`);
    });
    clear();
    return { clear };
  }

  return { SIDE, PAD, chart, paint, asDigit, pad };
})();
