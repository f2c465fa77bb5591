// A random network, forward and backward, beside what the theory predicts: the page "Try it".
// `Explorer` computes and knows of no page; the part below it draws and listens to the controls.

const Explorer = (() => {
  "use strict";
  const WIDTH = 100, SAMPLES = 16;
  const EPSILON = 1e-5; // under the root of a normalisation, as in gradlab.mlp

  // f(z), and its slope from z and a = f(z).  What is not a number stays so.
  const twoPieces = (leak) => ({
    leak,
    f: (z) => (z > 0 ? z : leak * z),
    slope: (z) => (z > 0 ? 1 : z <= 0 ? leak : NaN),
  });
  const ACTIVATIONS = {
    relu: twoPieces(0),
    leaky_relu: twoPieces(0.2),
    linear: twoPieces(1),
    tanh: { f: Math.tanh, slope: (z, a) => 1 - a * a },
  };

  // Standard normal numbers.  Uniform ones come from mulberry32, a generator with 32 bits of state
  // (T. Ettinger, public domain); the formula of Box and Muller turns two of them into two normal ones.
  function normals(seed) {
    let state = seed;
    const uniform = () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32; // never 0: its logarithm is taken
    };
    return (count) => {
      const drawn = new Float32Array(count);
      for (let i = 0; i < count; i += 2) {
        const radius = Math.sqrt(-2 * Math.log(uniform())), angle = 2 * Math.PI * uniform();
        drawn[i] = radius * Math.cos(angle);
        drawn[i + 1] = radius * Math.sin(angle);
      }
      return drawn;
    };
  }

  // Input, target and weights of one network.  A layer is drawn when a depth first needs it: the
  // controls leave the random numbers as they are.
  function draw(seed) {
    const next = normals(seed), weights = [];
    const input = next(SAMPLES * WIDTH), target = next(SAMPLES * WIDTH);
    const layers = (count) => {
      while (weights.length < count) weights.push(next(WIDTH * WIDTH));
      return weights.slice(0, count);
    };
    return { input, target, layers };
  }

  // ---------------------------------------------------------------------------------------------
  // The network.  Every array that is kept is a Float32Array, (samples, units) row after row: what
  // exceeds 3.4e38 becomes infinite in it.

  // z = scale · h W forward, or h Wᵀ backward; W is (units in, units out).  Four samples at a time:
  // each weight is fetched once for all of them.
  function product(h, weight, scale, transposed) {
    const z = new Float32Array(h.length), N = WIDTH;
    const [down, across] = transposed ? [1, N] : [N, 1];
    for (let row = 0; row < z.length; row += 4 * N)
      for (let j = 0; j < N; j++) {
        let a = 0, b = 0, c = 0, d = 0;
        for (let k = row, w = j * across; k < row + N; k++, w += down) {
          a += h[k] * weight[w];
          b += h[k + N] * weight[w];
          c += h[k + 2 * N] * weight[w];
          d += h[k + 3 * N] * weight[w];
        }
        z[row + j] = scale * a;
        z[row + N + j] = scale * b;
        z[row + 2 * N + j] = scale * c;
        z[row + 3 * N + j] = scale * d;
      }
    return z;
  }

  // The places of the numbers that are normalised together: a sample's, or a unit's over the batch.
  const places = (count, place) => Array.from({ length: count }, (_, n) => place(n));
  const GROUPS = {
    none: [],
    layer: places(SAMPLES, (s) => places(WIDTH, (unit) => s * WIDTH + unit)),
    batch: places(WIDTH, (unit) => places(SAMPLES, (s) => s * WIDTH + unit)),
  };

  function average(group, value) {
    let sum = 0;
    for (const i of group) sum += value(i);
    return sum / group.length;
  }

  // In each group: minus the mean, divided by the deviation.  `back` turns the gradient with respect
  // to the result into that with respect to z, in place.
  function normalise(z, kind) {
    const result = z.slice();
    const deviations = GROUPS[kind].map((group) => {
      const mean = average(group, (i) => z[i]);
      const deviation = Math.sqrt(average(group, (i) => (z[i] - mean) ** 2) + EPSILON);
      for (const i of group) result[i] = (z[i] - mean) / deviation;
      return deviation;
    });
    const back = (g) => {
      GROUPS[kind].forEach((group, number) => {
        const mean = average(group, (i) => g[i]), along = average(group, (i) => g[i] * result[i]);
        for (const i of group) g[i] = (g[i] - mean - along * result[i]) / deviations[number];
      });
      return g;
    };
    return { result, back };
  }

  // h ← keep·h + times·φ(h)·W leads from layer to layer: without a skip, h are the pre-activations
  // of a plain network.  Layer normalisation acts on what φ reads, batch normalisation on φ(h)·W.
  // The first h is random, of the size that such a layer would give it.  Then back from the loss
  // Σ h·target, h being the last layer's: `gradients` are ∂loss/∂h, layer by layer.
  function run(network, { activation, gain, depth, skip, norm }) {
    const { f, slope } = ACTIVATIONS[activation];
    const scale = gain / Math.sqrt(WIDTH), keep = skip ? 1 : 0, times = skip || 1;
    const first = Math.sqrt(firstSquare({ activation, gain, norm }));
    let h = network.input.map((value) => first * value);
    const outputs = [h], passed = [];
    for (const weight of network.layers(depth - 1)) {
      const before = normalise(h, norm === "layer" ? norm : "none");
      const a = before.result.map(f);
      const after = normalise(product(a, weight, scale, false), norm === "batch" ? norm : "none");
      h = h.map((value, i) => keep * value + times * after.result[i]);
      outputs.push(h);
      passed.push({ weight, before, a, after });
    }
    let gradient = network.target; // ∂loss/∂h of the last layer
    const gradients = [gradient];
    for (const { weight, before, a, after } of passed.reverse()) {
      const g = after.back(gradient.map((value) => times * value));
      const delta = product(g, weight, scale, true);
      const inner = before.back(delta.map((value, i) => value * slope(before.result[i], a[i])));
      gradient = gradient.map((value, i) => keep * value + inner[i]);
      gradients.unshift(gradient);
    }
    return { outputs, gradients };
  }

  // What is drawn: the size of ∂loss/∂h at each layer, as a multiple of the last layer's; and the
  // number of the first layer whose h is not finite, or 0.
  function measure(network, settings) {
    const { outputs, gradients } = run(network, settings);
    const sizes = gradients.map((g) => Math.sqrt(g.reduce((sum, value) => sum + value * value, 0)));
    return {
      gradient: sizes.map((size) => size / sizes.at(-1)),
      overflow: outputs.findIndex((h) => !h.every(Number.isFinite)) + 1,
    };
  }

  // ---------------------------------------------------------------------------------------------
  // The prediction, for very wide layers: the formulas of gradlab.theory and gradlab.residual.

  // E[f(√q z)] over a standard normal z: midpoints, so that a kink at 0 lies between two of them.
  function gaussianMean(f, q) {
    const root = Math.sqrt(q), step = 0.02;
    let sum = 0;
    for (let z = -7 + step / 2; z < 7; z += step) sum += Math.exp((-z * z) / 2) * f(root * z);
    return (sum * step) / Math.sqrt(2 * Math.PI);
  }

  // Mean square of the first h: what the layer gives when φ reads numbers of mean square 1.
  function firstSquare({ activation, gain, norm }) {
    const { f } = ACTIVATIONS[activation];
    return norm === "batch" ? 1 : gain ** 2 * gaussianMean((z) => f(z) ** 2, 1);
  }

  // Growth of the squared gradient from what batch normalisation returns to h of mean square q.
  function batchGrowth({ leak, f, slope }, q) {
    const slopes = gaussianMean((z) => slope(z, f(z)) ** 2, q);
    const square = gaussianMean((z) => f(z) ** 2, q);
    if (leak === undefined) return slopes / (square - gaussianMean(f, q) ** 2);
    // φ = leak·x + r·relu(x): the exact numbers for few samples, two of which are correlated by rho.
    const n = SAMPLES, r = 1 - leak, rho = -1 / (n - 1);
    const both = 1 / 4 + Math.asin(rho) / (2 * Math.PI);
    const kernel = (Math.sqrt(1 - rho ** 2) + rho * (Math.PI - Math.acos(rho))) / (2 * Math.PI);
    const cross = leak ** 2 * rho + leak * r * rho + r ** 2 * kernel;
    const more = (leak ** 2 + leak * r + r ** 2 * both) / (n - 1);
    return ((n - 2) / (n - 3)) * (slopes + more) / (square - q * cross);
  }

  // What `measure` should find, layer by layer.
  function predict({ activation, gain, depth, skip, norm }) {
    const phi = ACTIVATIONS[activation], { f, slope } = phi;
    const keep = skip ? 1 : 0, strength = (skip || 1) ** 2;
    const growth = []; // of the squared gradient, back through layer 2, 3, …
    let q = firstSquare({ activation, gain, norm }); // mean square of h
    for (let layer = 1; layer < depth; layer++) {
      const read = norm === "layer" ? 1 : q; // mean square of what φ reads
      let added = gain ** 2 * gaussianMean((z) => f(z) ** 2, read);
      let through = gain ** 2 * gaussianMean((z) => slope(z, f(z)) ** 2, read) * (read / q);
      if (norm === "batch") [added, through] = [1, batchGrowth(phi, q)];
      growth.push(keep + strength * through);
      q = keep * q + strength * added;
    }
    return growth.reduceRight((sizes, factor) => [sizes[0] * Math.sqrt(factor), ...sizes], [1]);
  }

  return { WIDTH, SAMPLES, normals, draw, run, measure, predict };
})();

// -----------------------------------------------------------------------------------------------
// The page: controls, drawing, and the sentence below it.

(() => {
  "use strict";
  const root = document.querySelector(".explorer");
  const part = (name) => root.querySelector(`.explorer-${name}`);
  const form = part("controls"), svg = part("plot");
  const HEIGHT = 300, LEFT = 66, RIGHT = 12, TOP = 14, BOTTOM = 46;
  let seed = 0, network = Explorer.draw(seed), shown;

  function settings() {
    const { activation, gain, depth, skip, norm } = form.elements;
    return {
      activation: activation.value,
      gain: Number(gain.value),
      depth: Number(depth.value),
      skip: skip.value === "scaled" ? Number(depth.value) ** -0.5 : Number(skip.value),
      norm: norm.value,
    };
  }

  function power(exponent) {
    const digits = [...String(Math.abs(exponent))].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
    return `10${exponent < 0 ? "⁻" : ""}${digits}`;
  }

  function number(value) {
    if (value >= 0.001 && value < 1e6) return String(Number(value.toPrecision(3)));
    const [mantissa, exponent] = value.toExponential(1).split("e");
    return `${mantissa} × ${power(Number(exponent))}`;
  }

  function sentence({ measured, predicted, overflow }) {
    const steps = measured.length - 1, total = measured[0];
    const perLayer = (ratio) => (ratio ** (1 / steps)).toFixed(2);
    const expected = ` Predicted: ${perLayer(predicted[0])} a layer.`;
    const limit = "exceeds the largest float32 number, 3.4 × 10³⁸";
    if (overflow)
      return `On the way forward layer ${overflow} ${limit}: what comes back is not a number.${expected}`;
    const broken = measured.findLastIndex((value) => !Number.isFinite(value)) + 1;
    if (broken) return `On the way back the gradient at layer ${broken} ${limit}.${expected}`;
    const change = total < 1 ? `shrinks to ${number(total)} of its size` : `grows ${number(total)}-fold`;
    return `Back to layer 1 the gradient ${change}, or ${perLayer(total)} a layer.${expected}`;
  }

  function paint() {
    const { measured, predicted } = shown, depth = measured.length;
    const width = Math.max(svg.clientWidth, 200);
    const logs = [...measured, ...predicted].map(Math.log10).filter(Number.isFinite);
    const low = Math.floor(Math.min(-1, ...logs)), high = Math.ceil(Math.max(2, ...logs));
    const x = (layer) => LEFT + 8 + ((layer - 1) / (depth - 1)) * (width - LEFT - RIGHT - 16);
    const y = (log) => TOP + ((high - log) / (high - low)) * (HEIGHT - TOP - BOTTOM);
    const at = (value, i) => `${x(i + 1).toFixed(1)},${y(Math.log10(value)).toFixed(1)}`;
    const text = (px, py, words, more = "") => `<text x="${px}" y="${py}" ${more}>${words}</text>`;
    const marks = [];
    const decades = [1, 2, 5, 10].find((step) => (high - low) / step <= 8);
    for (let log = Math.ceil(low / decades) * decades; log <= high; log += decades) {
      const line = `M${LEFT},${y(log)}H${width - RIGHT}`;
      marks.push(`<path class="explorer-grid" d="${line}"/>`);
      marks.push(text(LEFT - 6, y(log) + 4, log ? power(log) : "1", 'text-anchor="end"'));
    }
    const apart = [1, 2, 5, 10, 20].find((step) => depth / step <= 10);
    for (let layer = apart; layer <= depth; layer += apart)
      marks.push(text(x(layer), HEIGHT - BOTTOM + 18, layer, 'text-anchor="middle"'));
    if (apart > 1) marks.push(text(x(1), HEIGHT - BOTTOM + 18, 1, 'text-anchor="middle"'));
    const middle = (LEFT + width - RIGHT) / 2, turn = (TOP + HEIGHT - BOTTOM) / 2;
    marks.push(text(middle, HEIGHT - 8, "layer (1 is next to the input)", 'text-anchor="middle"'));
    const turned = `text-anchor="middle" transform="rotate(-90 14 ${turn})"`;
    marks.push(text(14, turn, "gradient ÷ last layer’s (log)", turned));
    measured.forEach((value, i) => {
      const [cx, cy] = at(value, i).split(",");
      if (Number.isFinite(value) && value > 0)
        marks.push(`<circle class="explorer-dot" cx="${cx}" cy="${cy}" r="${depth > 40 ? 2.5 : 3}"/>`);
      else marks.push(`<path class="explorer-cross" d="M${cx - 3},${TOP - 3}l6,6m0,-6l-6,6"/>`);
    });
    marks.push(`<polyline class="explorer-line" points="${predicted.map(at).join(" ")}"/>`);
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.innerHTML = marks.join("");
    part("failed").hidden = measured.every(Number.isFinite);
  }

  function update() {
    const now = settings(), { gradient, overflow } = Explorer.measure(network, now);
    shown = { measured: gradient, predicted: Explorer.predict(now), overflow };
    Explorer.shown = { settings: now, ...shown }; // for the tests
    part("gain").value = now.gain.toFixed(2);
    part("depth").value = now.depth;
    part("batch").hidden = !(now.norm === "batch" && now.activation === "tanh");
    part("readout").textContent = sentence(shown);
    paint();
  }

  let waiting = false; // one computation a frame, however fast a slider moves
  function soon() {
    if (!waiting) requestAnimationFrame(() => { waiting = false; update(); });
    waiting = true;
  }

  form.addEventListener("input", soon);
  form.addEventListener("submit", (event) => event.preventDefault());
  part("again").addEventListener("click", () => { network = Explorer.draw(++seed); soon(); });
  document.querySelector(".explorer-without").remove();
  root.hidden = false;
  update();
  new ResizeObserver(paint).observe(root);
})();
