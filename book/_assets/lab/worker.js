// What the lab's worker does: it trains a pair until it is told to stop, and reports twice an epoch. It gets
//
//     { digits }                          the digits, { train, test }, once
//     { run, seed, epochs, guidance }     train a pair from the start
//     { run }                             stop what has another number
//     { image }                           explain the networks' answers to it, now and at each report
function trainInWorker() {
  const lab = guidedTraining();
  let [digits, networks, shown, current] = [null, null, null, 0];

  const explained = () => shown && networks && networks.map((network) => lab.explain(network, shown));

  async function train({ run, seed, epochs, guidance }) {
    const { plain, guided, batches } = lab.pair(digits.train, seed, guidance);
    networks = [plain.network, guided.network];
    const perEpoch = Math.ceil(digits.train.labels.length / lab.BATCH_SIZE);
    let window = { steps: 0, images: 0, hits: [0, 0], loss: [0, 0], multipliers: [Infinity, -Infinity] };
    const report = (step, more = {}) => {
      const over = (values, n) => values.map((value) => (n ? value / n : null));
      postMessage({
        run, step, epoch: step / perEpoch, done: step === epochs * perEpoch,
        test: networks.map((network) => lab.accuracy(network, digits.test)),
        train: over(window.hits, window.images), loss: over(window.loss, window.steps),
        multipliers: window.steps ? window.multipliers : null, explained: explained(), ...more,
      });
      window = { steps: 0, images: 0, hits: [0, 0], loss: [0, 0], multipliers: [Infinity, -Infinity] };
    };
    report(0);
    let rest = performance.now();
    for (let step = 1; step <= epochs * perEpoch; step++) {
      const batch = batches.next().value;
      try {
        [plain.step(batch), guided.step(batch)].forEach((result, arm) => {
          window.hits[arm] += result.hits;
          window.loss[arm] += result.loss;
          if (arm) {
            window.multipliers[0] = Math.min(window.multipliers[0], result.multipliers[0]);
            window.multipliers[1] = Math.max(window.multipliers[1], result.multipliers[1]);
          }
        });
      } catch (error) {
        report(step - 1, { done: true, diverged: `step ${step}: ${error.message}` });
        return;
      }
      window.steps += 1;
      window.images += batch.labels.length;
      if (step % (perEpoch / 2) === 0) report(step);
      if (performance.now() - rest > 30) {
        await new Promise((resolve) => setTimeout(resolve)); // messages come in here
        rest = performance.now();
        if (run !== current) return;
      }
    }
  }

  onmessage = ({ data }) => {
    if (data.digits) digits = data.digits;
    if (data.run !== undefined) current = data.run;
    if (data.image) {
      shown = data.image;
      postMessage({ explained: explained() });
    }
    if (data.guidance) train(data);
  };
}
