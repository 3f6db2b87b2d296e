// The lab: a reader sets the LRP factor, and two networks train in the page, plain and guided, from the same weights.
//
// Every element of the class `athena-lab` becomes one. The digits and the training are loaded once it is on the screen or
// used. All training is done by a worker (worker.js), with the functions of guidance.js; drawing.js draws, and lab.css has
// colours and sizes.
(() => {
  "use strict";

  const HERE = new URL(".", document.currentScript.src);
  const EPOCHS = 20;
  const LOWEST = 0.01; // where the slider begins beside 0; it is logarithmic from there on
  const DECADES = 4;
  const STOPS = 400;
  const PRESETS = [
    { name: "no effect", factor: 0.01, tip: "1 + λR stays within a few percent of 1" },
    { name: "collapse", factor: 10, tip: "gradients are multiplied by hundreds and change their sign" },
    { name: "damping", factor: -1, tip: "what is relevant learns more slowly" },
  ];
  const SCOPES = [
    ["both hidden layers", ["linear1", "linear2"]],
    ["only the first", ["linear1"]],
    ["only the second", ["linear2"]],
  ];
  const NORMALISE = [
    ["none, as in the thesis", null],
    ["largest magnitude 1", "max"],
    ["root mean square 1", "rms"],
  ];

  const loaded = {};
  function script(name) {
    loaded[name] ??= new Promise((resolve, reject) => {
      const element = document.createElement("script");
      element.src = new URL(name, HERE);
      element.onload = resolve;
      element.onerror = () => reject(new Error(`${name} could not be loaded; reload the page`));
      document.head.append(element);
    });
    return loaded[name];
  }

  // The digits as numbers from 0 to 1.
  async function readDigits() {
    const { SIDE } = labDrawing;
    await script("digits.js");
    const picture = new Image();
    picture.src = labDigits.picture;
    await picture.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.width, picture.height];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const sheet = context.getImageData(0, 0, canvas.width, canvas.height);
    const labels = Array.from(labDigits.labels, Number);
    const images = new Float64Array(labels.length * SIDE * SIDE);
    labels.forEach((_, n) => {
      const [left, top] = [(n % labDigits.across) * SIDE, Math.floor(n / labDigits.across) * SIDE];
      for (let i = 0; i < SIDE * SIDE; i++) {
        const at = (top + Math.floor(i / SIDE)) * sheet.width + left + (i % SIDE);
        images[n * SIDE * SIDE + i] = sheet.data[4 * at] / 255;
      }
    });
    const part = (from, to) => ({ images: images.slice(from * SIDE * SIDE, to * SIDE * SIDE), labels: labels.slice(from, to) });
    return { train: part(0, labDigits.train), test: part(labDigits.train, labels.length) };
  }

  async function newWorker() {
    await Promise.all([script("guidance.js"), script("worker.js")]);
    const source = `${guidedTraining}\n(${trainInWorker})();`;
    const worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
    const digits = await readDigits();
    worker.postMessage({ digits });
    return { worker, digits };
  }

  const minus = (text) => text.replace("-", "−");
  const percent = (share) => (share === null ? "–" : `${(100 * share).toFixed(1)} %`);
  const number = (value) => minus(Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(value === 0 ? 1 : 3));
  const factorText = (value) => minus(String(Number(value.toPrecision(3))));
  const magnitude = (stop) => (stop === 0 ? 0 : LOWEST * 10 ** ((DECADES * (stop - 1)) / (STOPS - 1)));
  const stopOf = (size) => (size < LOWEST ? 0 : Math.min(STOPS, Math.round(1 + ((STOPS - 1) * Math.log10(size / LOWEST)) / DECADES)));

  let labs = 0;

  function build(root) {
    const { SIDE, PAD, chart, paint, asDigit, pad } = labDrawing;
    const id = `lab${labs++}`;
    const options = (pairs) => pairs.map(([name], i) => `<option value="${i}">${name}</option>`).join("");
    root.innerHTML = `
      <div class="lab-controls">
        <div class="lab-factor">
          <label for="${id}-size">LRP factor λ</label>
          <span class="lab-value" aria-hidden="true"></span>
          <input type="range" id="${id}-size" min="0" max="${STOPS}" step="1">
        </div>
        <fieldset class="lab-sign" aria-label="Sign of λ">
          <label><input type="radio" name="${id}-sign" value="1" checked> + what is relevant learns faster</label>
          <label><input type="radio" name="${id}-sign" value="-1"> − it is damped</label>
        </fieldset>
        <div class="lab-buttons" role="group" aria-label="Factors to begin with">${PRESETS.map(
          ({ name, factor, tip }, i) => `<button type="button" data-preset="${i}" title="${tip}">${name} <span>λ = ${factorText(factor)}</span></button>`,
        ).join("")}</div>
        <details><summary>More settings</summary><div class="lab-more">
          <label>λ, typed <input type="number" step="any" data-name="typed"></label>
          <label>Guided layers <select data-name="scope">${options(SCOPES)}</select></label>
          <label>Relevance of a sample divided, so that <select data-name="normalise">${options(NORMALISE)}</select></label>
          <label>Seed <input type="number" min="0" max="999999" step="1" value="0" data-name="seed"></label>
        </div></details>
        <div class="lab-buttons"><button type="button" class="lab-go" data-go="train">Train both networks</button></div>
      </div>
      <div class="lab-results">
        <p class="lab-legend"><span class="plain">plain</span> <span class="guided">guided</span>, accuracy in %. Thick: on 1,000 test digits. Thin: on the
          batches of training.</p>
        <svg role="img" aria-label="No training yet"></svg>
        <table><caption>After <span data-name="epoch">0</span> of ${EPOCHS} epochs</caption>
          <thead><tr><td></td><th scope="col">plain</th><th scope="col">guided</th></tr></thead>
          <tbody><tr><th scope="row">test accuracy</th><td>–</td><td>–</td></tr><tr><th scope="row">training accuracy</th><td>–</td><td>–</td></tr>
          <tr><th scope="row">loss</th><td>–</td><td>–</td></tr><tr><th scope="row">1 + λR, from … to</th><td>1</td><td>–</td></tr></tbody></table>
        <p class="lab-status" role="status" aria-live="polite"></p>
      </div>
      <div class="lab-digit">
        <div><canvas class="lab-pad" width="${PAD}" height="${PAD}" tabindex="0" role="application" aria-describedby="${id}-how"
          aria-label="Square to draw a digit in"></canvas>
          <div class="lab-buttons"><button type="button" data-go="clear">Clear</button><button type="button" data-go="another">A test digit</button></div></div>
        <figure><canvas width="${SIDE}" height="${SIDE}" role="img" aria-label="Nothing drawn yet"></canvas><figcaption>what the networks see</figcaption></figure>
        <figure><canvas width="${SIDE}" height="${SIDE}" role="img" aria-label="No heat map yet"></canvas><figcaption>plain: not trained yet</figcaption></figure>
        <figure><canvas width="${SIDE}" height="${SIDE}" role="img" aria-label="No heat map yet"></canvas><figcaption>guided: not trained yet</figcaption></figure>
        <p id="${id}-how">Draw a digit with mouse or finger, or with the arrow keys; the space bar lowers and lifts the pen. The maps show which pixels
          speak for each network's answer (red) and against it (blue), each by its own largest relevance.</p>
      </div>`;
    const find = (selector) => root.querySelector(selector);
    const named = (name) => find(`[data-name="${name}"]`);
    const [slider, output, typed, go, status, svg] = [find("input[type=range]"), find(".lab-value"), named("typed"), find(".lab-go"), find(".lab-status"), find("svg")];
    const [seen, ...maps] = root.querySelectorAll("figure");
    let [factor, run, running, trained, wait, ready, points, answers, digit] = [10, 0, false, false, 0, null, [], null, null];

    function setFactor(value, mover) {
      factor = value;
      if (mover !== slider) slider.value = stopOf(Math.abs(value));
      if (mover !== typed) typed.value = Number(value.toPrecision(3));
      if (value !== 0) find(`input[type=radio][value="${Math.sign(value)}"]`).checked = true;
      output.textContent = factorText(value);
      slider.setAttribute("aria-valuetext", `λ = ${factorText(value)}${value === 0 ? ", plain training" : ""}`);
    }

    function prepare() {
      ready ??= newWorker().then((made) => {
        made.worker.onmessage = ({ data }) => receive(data);
        made.worker.onerror = (event) => say(`The training stopped: ${event.message}`);
        return made;
      });
      ready.catch((error) => say(error.message));
      return ready;
    }

    const say = (text) => (status.textContent = text);

    function setRunning(now) {
      running = now;
      go.textContent = now ? "Stop" : trained ? "Train again" : "Train both networks";
      root.classList.toggle("lab-running", now);
    }

    async function start() {
      clearTimeout(wait);
      run += 1;
      const mine = run;
      trained = true;
      setRunning(true);
      say(`Training with λ = ${factorText(factor)} …`);
      const { worker } = await prepare();
      if (mine !== run) return;
      points = [];
      const guidance = { factor, scope: SCOPES[named("scope").value][1], normalise: NORMALISE[named("normalise").value][1] };
      worker.postMessage({ run, seed: Math.abs(Math.trunc(Number(named("seed").value))), epochs: EPOCHS, guidance });
    }

    async function stop() {
      run += 1;
      setRunning(false);
      const point = points.at(-1);
      say(point ? `Stopped after ${point.epoch.toFixed(1)} epochs. ${outcome(point)}` : "Stopped.");
      (await prepare()).worker.postMessage({ run });
    }

    // A change trains anew, once there has been a training: after a pause, as sliders and keys come in many steps.
    function changed() {
      clearTimeout(wait);
      if (trained) wait = setTimeout(start, 400);
    }

    function outcome({ test }) {
      const difference = 100 * (test[1] - test[0]);
      return `Test accuracy: plain ${percent(test[0])}, guided with λ = ${factorText(factor)} ${percent(test[1])}; a difference of ${minus(difference.toFixed(1))} points in one pair of seeds.`;
    }

    function receive(data) {
      if (data.explained) explain(data.explained);
      if (data.run !== run || !running) return;
      points.push(data);
      chart(svg, points, EPOCHS);
      const cells = root.querySelectorAll("tbody td");
      const rows = [data.test.map(percent), data.train.map(percent), data.loss.map((loss) => (loss === null ? "–" : loss.toFixed(2)))];
      rows.flat().forEach((text, i) => (cells[i].textContent = text));
      if (data.multipliers) cells[7].textContent = data.multipliers[0] <= data.multipliers[1] ? data.multipliers.map(number).join(" to ") : "1";
      named("epoch").textContent = minus(String(Math.floor(data.epoch)));
      svg.setAttribute("aria-label", `Curves of accuracy over ${data.epoch} epochs. ${outcome(data)}`);
      if (data.diverged) say(`Training ended at ${data.diverged}. ${outcome(data)}`);
      else if (data.done) say(`Done. ${outcome(data)}`);
      if (data.done) setRunning(false);
    }

    function explain(found) {
      answers = found;
      found.forEach(({ answer, probability, logit, pixels }, arm) => {
        const [canvas, caption] = maps[arm].children;
        const text = `${["plain", "guided"][arm]}: ${answer}, with ${(100 * probability).toFixed(0)} %, logit ${number(logit)}`;
        paint(canvas, pixels, true);
        caption.textContent = text;
        canvas.setAttribute("aria-label", `Heat map of the pixels' relevance, ${text}`);
      });
    }

    async function show(image, words) {
      digit = image;
      paint(seen.firstElementChild, image, false);
      seen.firstElementChild.setAttribute("aria-label", words);
      (await prepare()).worker.postMessage({ image: digit });
    }

    const square = pad(find(".lab-pad"), () => {
      const image = asDigit(find(".lab-pad"));
      if (image) show(image, "Your digit, 16 by 16 pixels");
    });

    async function another() {
      const { digits } = await prepare();
      const n = Math.floor(Math.random() * digits.test.labels.length);
      const image = digits.test.images.slice(n * SIDE * SIDE, (n + 1) * SIDE * SIDE);
      square.clear();
      await show(image, `A test digit, a ${digits.test.labels[n]}`);
      find(".lab-pad").getContext("2d").imageSmoothingEnabled = false;
      find(".lab-pad").getContext("2d").drawImage(seen.firstElementChild, 0, 0, PAD, PAD);
    }

    slider.addEventListener("input", () => {
      setFactor(magnitude(Number(slider.value)) * Number(find("input[type=radio]:checked").value), slider);
      changed();
    });
    typed.addEventListener("input", () => {
      if (typed.value === "" || !Number.isFinite(Number(typed.value))) return;
      setFactor(Number(typed.value), typed);
      changed();
    });
    root.querySelectorAll("input[type=radio]").forEach((radio) =>
      radio.addEventListener("change", () => {
        setFactor(Math.abs(factor) * Number(radio.value), radio);
        changed();
      }),
    );
    for (const name of ["scope", "normalise", "seed"]) named(name).addEventListener("input", changed);
    root.addEventListener("click", ({ target }) => {
      const button = target.closest("button");
      if (!button) return;
      if (button.dataset.preset) {
        setFactor(PRESETS[button.dataset.preset].factor);
        start();
      } else if (button === go) running ? stop() : start();
      else if (button.dataset.go === "another") another();
      else if (button.dataset.go === "clear") square.clear();
    });

    setFactor(factor);
    chart(svg, points, EPOCHS);
    new IntersectionObserver((entries, observer) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      prepare().then(() => digit ?? another());
    }).observe(find(".lab-digit"));
  }

  const all = () => script("drawing.js").then(() => document.querySelectorAll(".athena-lab").forEach(build));
  document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", all) : all();
})();
