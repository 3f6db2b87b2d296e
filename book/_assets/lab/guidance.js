// Relevance-guided training of a small network, as `athena.Guidance` does it, in plain JavaScript and float64.
//
// An array of numbers for a batch has one row for each sample. The letters are those of the package: `z` is the output
// of a layer, `a` its input, `R` relevance, and `d` what is sent down, with R = z d. A test trains 50 steps here and
// with the package, from the same start, and compares. Everything lies in one function, so that a page opened as a file
// can hand its text to a worker.
function guidedTraining() {
  "use strict";

  const SIZES = [256, 64, 32, 10]; // 16 x 16 pixels, two hidden layers with ReLU, ten classes
  const PATHS = ["linear1", "linear2", "linear3"];
  const EPSILON = 1e-6; // of LRP-epsilon
  const BATCH_SIZE = 32;
  const ADAM = { learningRate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }; // as torch.optim.Adam

  // Random numbers in [0, 1) that follow from a seed (mulberry32).
  function randomNumbers(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t = (t + Math.imul(t ^ (t >>> 7), t | 61)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  // The layers of a network, with initial weights as nn.Linear draws them: uniform within 1 / sqrt(inputs).
  function newNetwork(random) {
    return PATHS.map((path, l) => {
      const [inputs, outputs] = [SIZES[l], SIZES[l + 1]];
      const draw = () => (2 * random() - 1) / Math.sqrt(inputs);
      const weight = Float64Array.from({ length: outputs * inputs }, draw); // (outputs, inputs)
      return { path, inputs, outputs, weight, bias: Float64Array.from({ length: outputs }, draw) };
    });
  }

  function copyOf(network) {
    return network.map((layer) => ({ ...layer, weight: layer.weight.slice(), bias: layer.bias.slice() }));
  }

  // The indices 0 to n - 1 in random order (Fisher and Yates).
  function shuffled(n, random) {
    const order = Array.from({ length: n }, (_, i) => i);
    for (let i = n - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }

  // Where the inputs of sample `i` are not 0: most pixels are, and so are the outputs of many neurons.
  function active(a, i, inputs) {
    const found = new Int32Array(inputs);
    let count = 0;
    for (let j = 0; j < inputs; j++) if (a[i * inputs + j] !== 0) found[count++] = j;
    return found.subarray(0, count);
  }

  // z = W a + b
  function affine({ inputs, outputs, weight, bias }, a) {
    const n = a.length / inputs;
    const z = new Float64Array(n * outputs);
    for (let i = 0; i < n; i++) {
      const at = active(a, i, inputs);
      for (let k = 0; k < outputs; k++) {
        let sum = bias[k];
        for (let m = 0; m < at.length; m++) sum += weight[k * inputs + at[m]] * a[i * inputs + at[m]];
        z[i * outputs + k] = sum;
      }
    }
    return z;
  }

  // The gradients of a layer's weight and bias, from its input and the gradient `g` of its output.
  function weightGradients({ inputs, outputs }, a, g) {
    const weight = new Float64Array(outputs * inputs);
    const bias = new Float64Array(outputs);
    for (let i = 0; i < a.length / inputs; i++) {
      const at = active(a, i, inputs);
      for (let k = 0; k < outputs; k++) {
        const own = g[i * outputs + k];
        if (own === 0) continue;
        bias[k] += own;
        for (let m = 0; m < at.length; m++) weight[k * inputs + at[m]] += own * a[i * inputs + at[m]];
      }
    }
    return { weight, bias };
  }

  // W^T s: the way down through a layer, of gradients and of relevance alike.
  function down({ inputs, outputs, weight }, s) {
    const n = s.length / outputs;
    const below = new Float64Array(n * inputs);
    for (let i = 0; i < n; i++) {
      for (let k = 0; k < outputs; k++) {
        const share = s[i * outputs + k];
        if (share === 0) continue;
        for (let j = 0, w = k * inputs, x = i * inputs; j < inputs; j++) below[x + j] += weight[w + j] * share;
      }
    }
    return below;
  }

  // What passes a ReLU on the way down.
  const throughReLU = (below, z) => below.map((value, i) => (z[i] > 0 ? value : 0));

  // The inputs `a` and the outputs `z` of all layers.
  function forward(network, x) {
    const a = [x];
    const z = [];
    network.forEach((layer, l) => {
      z.push(affine(layer, a[l]));
      if (l + 1 < network.length) a.push(z[l].map((value) => Math.max(value, 0)));
    });
    return { a, z, logits: z[z.length - 1] };
  }

  function softmax(logits, classes = SIZES[SIZES.length - 1]) {
    const p = new Float64Array(logits.length);
    for (let first = 0; first < p.length; first += classes) {
      const row = logits.subarray(first, first + classes);
      const largest = Math.max(...row);
      let sum = 0;
      row.forEach((logit, k) => (sum += p[first + k] = Math.exp(logit - largest)));
      for (let k = 0; k < classes; k++) p[first + k] /= sum;
    }
    return p;
  }

  // The class with the largest logit, for each sample.
  function predicted(logits, classes = SIZES[SIZES.length - 1]) {
    return Array.from({ length: logits.length / classes }, (_, i) => {
      const row = logits.subarray(i * classes, (i + 1) * classes);
      return row.indexOf(Math.max(...row));
    });
  }

  // LRP-epsilon from the logit of the predicted class down: R of each layer's output, and of the pixels if asked for.
  function relevance(network, { a, z, logits }, ofPixels = false) {
    const top = network.length - 1;
    let d = new Float64Array(logits.length);
    predicted(logits).forEach((k, i) => (d[i * network[top].outputs + k] = 1));
    const R = [];
    for (let l = top; l >= 0; l--) {
      R[l] = d.map((value, i) => value * z[l][i]);
      if (l === 0 && !ofPixels) break;
      const s = d.map((value, i) => (value * z[l][i]) / (z[l][i] + (z[l][i] < 0 ? -EPSILON : EPSILON)));
      const below = down(network[l], s);
      if (l === 0) return { layers: R, pixels: below.map((value, i) => value * a[0][i]) };
      d = throughReLU(below, z[l - 1]);
    }
    return { layers: R };
  }

  // Relevance divided, for each sample, by its largest magnitude ("max") or its root mean square ("rms").
  function normalised(R, width, normalise) {
    if (normalise === null) return R;
    const result = R.slice();
    for (let first = 0; first < R.length; first += width) {
      const row = result.subarray(first, first + width);
      const size =
        normalise === "max"
          ? row.reduce((most, value) => Math.max(most, Math.abs(value)), 0)
          : Math.sqrt(row.reduce((sum, value) => sum + value * value, 0) / width);
      for (let k = 0; k < width; k++) row[k] /= Math.max(size, Number.MIN_VALUE);
    }
    return result;
  }

  // The loss of a batch (cross-entropy), and the gradients of all weights. Guided, the gradient that reaches the output
  // of a layer in `scope` is multiplied by 1 + factor R, and what is scaled goes on down. `guidance` is null, or
  // { factor, scope: [paths], normalise: null, "max" or "rms" }. The layer that makes the output is never guided.
  function gradients(network, x, labels, guidance) {
    const n = labels.length;
    const top = network.length - 1;
    const pass = forward(network, x);
    const R = guidance === null ? null : relevance(network, pass).layers;
    let g = softmax(pass.logits);
    let loss = 0;
    labels.forEach((label, i) => {
      const at = i * network[top].outputs + label;
      loss -= Math.log(Math.max(g[at], Number.MIN_VALUE)) / n;
      g[at] -= 1;
    });
    g = g.map((value) => value / n);
    const multipliers = [Infinity, -Infinity]; // the smallest and the largest
    const ofLayers = [];
    for (let l = top; l >= 0; l--) {
      const { path, outputs } = network[l];
      if (guidance !== null && l < top && guidance.scope.includes(path)) {
        const scale = normalised(R[l], outputs, guidance.normalise).map((value) => 1 + guidance.factor * value);
        scale.forEach((value, i) => {
          g[i] *= value;
          if (value < multipliers[0]) multipliers[0] = value;
          if (value > multipliers[1]) multipliers[1] = value;
        });
        if (!g.every(Number.isFinite)) throw new RangeError(`the gradient at ${path} is no longer finite`);
      }
      ofLayers[l] = weightGradients(network[l], pass.a[l], g);
      if (l > 0) g = throughReLU(down(network[l], g), pass.z[l - 1]);
    }
    const hits = predicted(pass.logits).filter((k, i) => k === labels[i]).length;
    return { loss, hits, gradients: ofLayers, relevance: R, multipliers };
  }

  // Adam, for all weights of a network (Kingma and Ba 2015).
  function adam(network) {
    const parameters = network.flatMap(({ weight, bias }) => [weight, bias]);
    const means = parameters.map((p) => new Float64Array(p.length));
    const squares = parameters.map((p) => new Float64Array(p.length));
    const { learningRate, beta1, beta2, epsilon } = ADAM;
    let t = 0;
    return (ofLayers) => {
      t += 1;
      const [size, root] = [learningRate / (1 - beta1 ** t), Math.sqrt(1 - beta2 ** t)];
      const found = ofLayers.flatMap(({ weight, bias }) => [weight, bias]);
      for (let at = 0; at < found.length; at++) {
        const [p, gradient, m, v] = [parameters[at], found[at], means[at], squares[at]];
        for (let i = 0; i < p.length; i++) {
          m[i] += (1 - beta1) * (gradient[i] - m[i]);
          v[i] = beta2 * v[i] + (1 - beta2) * gradient[i] * gradient[i];
          p[i] -= (size * m[i]) / (Math.sqrt(v[i]) / root + epsilon);
        }
      }
    };
  }

  // Rows of an array of images.
  function rows(images, indices) {
    const chosen = new Float64Array(indices.length * SIZES[0]);
    indices.forEach((from, to) => chosen.set(images.subarray(from * SIZES[0], (from + 1) * SIZES[0]), to * SIZES[0]));
    return chosen;
  }

  // The batches of training without an end: new order in each epoch.
  function* batches({ images, labels }, random) {
    for (;;) {
      const order = shuffled(labels.length, random);
      for (let first = 0; first < order.length; first += BATCH_SIZE) {
        const chosen = order.slice(first, first + BATCH_SIZE);
        yield { x: rows(images, chosen), labels: chosen.map((i) => labels[i]) };
      }
    }
  }

  // One network in training; each call of `step` is one step on one batch.
  function training(network, guidance) {
    const update = adam(network);
    const step = ({ x, labels }) => {
      const result = gradients(network, x, labels, guidance);
      update(result.gradients);
      return result;
    };
    return { network, step };
  }

  // Two networks with the same initial weights and the same batches, which follow from the seed: plain and guided.
  function pair(train, seed, guidance) {
    const random = randomNumbers(seed);
    const start = newNetwork(random);
    return { plain: training(copyOf(start), null), guided: training(start, guidance), batches: batches(train, random) };
  }

  // The share of images that are classified rightly.
  function accuracy(network, { images, labels }) {
    const answers = predicted(forward(network, images).logits);
    return answers.filter((k, i) => k === labels[i]).length / labels.length;
  }

  // A network's answer to one image: class, probability, logit, and the relevance of the pixels for that answer.
  function explain(network, image) {
    const pass = forward(network, image);
    const [answer] = predicted(pass.logits);
    const { pixels } = relevance(network, pass, true);
    return { answer, probability: softmax(pass.logits)[answer], logit: pass.logits[answer], pixels };
  }

  return { SIZES, PATHS, BATCH_SIZE, pair, training, gradients, relevance, forward, accuracy, explain };
}
