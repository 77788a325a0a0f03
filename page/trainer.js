// Algorithm 1 for points in the plane, in plain JavaScript: the batch, the loss (14), its gradient,
// Adam, and the average of the weights. The line of the algorithm stands beside the code.
//
// B points are a Float32Array of 2 B numbers. t counts 0..T-1, as in ddpm.py. Nothing here is random
// but what `draw` draws, so that the same batches give the same network.

import { ABAR, BETAS, T, uniform } from "./sampler.js";

const WAVES = [3, 6, 12, 24]; // frequencies of sines of x_t, with which fine detail is learnt sooner
const HALF = 8, INPUTS = 2 + 4 * WAVES.length + 2 * HALF;
const EMBEDDING = ABAR.map((abar) => { // sines and cosines of half the logarithm of the signal-to-noise ratio
  const angles = Array.from({ length: HALF }, (_, k) => 0.15 * (k + 1) * Math.log(abar / (1 - abar)) / 2);
  return [...angles.map(Math.sin), ...angles.map(Math.cos)];
});

/** eps = a x_t + b output, for each target that the network can have. */
const TARGETS = {
  eps: () => [0, 1],
  x0: (t) => [1 / Math.sqrt(1 - ABAR[t]), -Math.sqrt(ABAR[t] / (1 - ABAR[t]))], // (4) solved for eps
  v: (t) => [Math.sqrt(1 - ABAR[t]), Math.sqrt(ABAR[t])],
};

/** The weight of the squared error of eps at t. */
export const WEIGHTS = {
  simple: () => 1, // (14)
  vlb: (t) => { // (12) with the large variance, whose first value is that of the second posterior
    const variance = t ? BETAS[t] : (BETAS[1] * (1 - ABAR[0])) / (1 - ABAR[1]);
    return BETAS[t] ** 2 / (2 * variance * (1 - BETAS[t]) * (1 - ABAR[t]));
  },
  "min-snr": (t) => Math.min(1, (5 * (1 - ABAR[t])) / ABAR[t]), // Hang et al. 2023
};

/** y = x W + b for B rows. W is stored by rows, (n, m). */
function affine(x, W, b, n) {
  const m = b.length, B = x.length / n, y = new Float32Array(B * m);
  for (let i = 0; i < B; i++) {
    y.set(b, i * m);
    for (let k = 0; k < n; k++) {
      const value = x[i * n + k];
      for (let j = 0; j < m; j++) y[i * m + j] += value * W[k * m + j];
    }
  }
  return y;
}

/** Given dL/dy of y = x W + b, add to dW and db, and return dL/dx. */
function affineBackward(x, W, dy, dW, db) {
  const m = db.length, B = dy.length / m, n = x.length / B, dx = new Float32Array(x.length);
  for (let i = 0; i < B; i++) {
    for (let j = 0; j < m; j++) db[j] += dy[i * m + j];
    for (let k = 0; k < n; k++) {
      const value = x[i * n + k];
      let sum = 0;
      for (let j = 0; j < m; j++) {
        dW[k * m + j] += value * dy[i * m + j];
        sum += W[k * m + j] * dy[i * m + j];
      }
      dx[i * n + k] = sum;
    }
  }
  return dx;
}

const sigmoid = (value) => 1 / (1 + Math.exp(-value));
const silu = (x) => x.map((value) => value * sigmoid(value));
const siluBackward = (x, dy) => x.map((value, k) => dy[k] * sigmoid(value) * (1 + value * (1 - sigmoid(value))));

/**
 * A network of two hidden layers, and its training.
 *
 * options: width of the layers; classes, how many y there are, of which `classes` means "no class";
 * target and weights, names of TARGETS and WEIGHTS; rate, the learning rate at first, which is halved
 * by step 1000; decay, of the average.
 */
export class Trainer {
  constructor({ width = 64, classes = 0, target = "eps", weights = "simple", rate = 0.012, decay = 0.999, seed = 0 } = {}) {
    const random = uniform(seed, 0), n = INPUTS + (classes && classes + 1);
    const glorot = (rows, columns) => Float32Array.from({ length: rows * columns }, () =>
      (2 * random() - 1) * Math.sqrt(6 / (rows + columns)));
    Object.assign(this, { classes, target, weights, rate, decay, inputs: n, steps: 0 });
    // W1, b1, W2, b2, W3, b3. The last layer begins at 0.
    this.parameters = [glorot(n, width), new Float32Array(width), glorot(width, width),
      new Float32Array(width), new Float32Array(2 * width), new Float32Array(2)];
    const zeros = () => this.parameters.map((p) => new Float32Array(p.length));
    [this.first, this.second] = [zeros(), zeros()]; // Adam's averages of the gradient and its square
    this.average = this.parameters.map((p) => p.slice());
  }

  /** What the network reads: x_t and its sines, the embedding of t, and one input for each y. */
  features(x, t, y) {
    const n = this.inputs, rows = new Float32Array((x.length / 2) * n), many = WAVES.length;
    t.forEach((level, i) => {
      for (let c = 0; c < 2; c++) {
        const value = x[2 * i + c], at = i * n + c;
        rows[at] = 4 * value;
        WAVES.forEach((w, k) => {
          rows[at + 2 + 2 * k] = Math.sin(w * value);
          rows[at + 2 + 2 * (many + k)] = Math.cos(w * value);
        });
      }
      rows.set(EMBEDDING[level], i * n + 2 + 4 * many);
      if (this.classes) rows[i * n + INPUTS + (y ? y[i] : this.classes)] = 1;
    });
    return rows;
  }

  /** All layers, for the gradient; the last one is the output. */
  forward([W1, b1, W2, b2, W3, b3], x) {
    const a1 = affine(x, W1, b1, this.inputs), h1 = silu(a1);
    const a2 = affine(h1, W2, b2, b1.length), h2 = silu(a2);
    return [x, a1, h1, a2, h2, affine(h2, W3, b3, b2.length)];
  }

  /** eps_theta(x_t, t) of the averaged network, or of the last weights. */
  eps(x, t, y, weights = this.average) {
    const output = this.forward(weights, this.features(x, t, y)).at(-1);
    return output.map((value, k) => {
      const [a, b] = TARGETS[this.target](t[k >> 1]);
      return a * x[k] + b * value;
    });
  }

  /** A gradient step of Algorithm 1 on a batch of `draw`. Returns {loss, xt, eps, gradient}. */
  step(batch) {
    const { t, noise, y } = batch, xt = noised(batch);
    const [x, a1, h1, a2, h2, output] = this.forward(this.parameters, this.features(xt, t, y));
    const [, , W2, , W3] = this.parameters, gradient = this.parameters.map((p) => new Float32Array(p.length));
    const [dW1, db1, dW2, db2, dW3, db3] = gradient, eps = new Float32Array(xt.length), n = eps.length;
    let loss = 0;
    const dOutput = output.map((value, k) => { // of the mean of weight (noise - eps)^2
      const [a, b] = TARGETS[this.target](t[k >> 1]), weight = WEIGHTS[this.weights](t[k >> 1]);
      eps[k] = a * xt[k] + b * value;
      loss += (weight * (noise[k] - eps[k]) ** 2) / n;
      return (-2 * weight * b * (noise[k] - eps[k])) / n;
    });
    const dA2 = siluBackward(a2, affineBackward(h2, W3, dOutput, dW3, db3));
    const dA1 = siluBackward(a1, affineBackward(h1, W2, dA2, dW2, db2));
    affineBackward(x, this.parameters[0], dA1, dW1, db1);
    this.adam(gradient);
    return { loss, xt, eps, gradient };
  }

  /** Adam with its usual constants, and the average of the weights (EMA), as in train.py. */
  adam(gradient) {
    const rate = this.rate / (1 + this.steps / 1000), k = ++this.steps, decay = Math.min(this.decay, k / (9 + k));
    const [bias1, bias2] = [1 - 0.9 ** k, 1 - 0.999 ** k];
    this.parameters.forEach((p, i) => {
      const [g, m, s, mean] = [gradient[i], this.first[i], this.second[i], this.average[i]];
      for (let j = 0; j < p.length; j++) {
        m[j] += 0.1 * (g[j] - m[j]);
        s[j] += 0.001 * (g[j] ** 2 - s[j]);
        p[j] -= (rate * m[j]) / bias1 / (Math.sqrt(s[j] / bias2) + 1e-8);
        mean[j] += (1 - decay) * (p[j] - mean[j]);
      }
    });
  }
}

/** x_t (4) of a batch, with a t for each point. */
export const noised = ({ x0, t, noise }) =>
  x0.map((value, k) => Math.sqrt(ABAR[t[k >> 1]]) * value + Math.sqrt(1 - ABAR[t[k >> 1]]) * noise[k]);

/**
 * The random part of a step: x_0 ~ q(x_0), t ~ Uniform, noise ~ N(0, I), and y, a tenth of which is
 * "no class".
 *
 * points: the data; each draw is one of them plus a Gaussian of deviation std. labels: their
 * classes, or null. random: a function of `uniform`.
 */
export function draw(points, std, labels, count, random) {
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const index = Array.from({ length: count }, () => Math.floor((random() * points.length) / 2));
  const none = labels && 1 + Math.max(...labels);
  return {
    x0: Float32Array.from({ length: 2 * count }, (_, k) => points[2 * index[k >> 1] + (k % 2)] + std * normal()),
    t: index.map(() => Math.floor(T * random())),
    noise: Float32Array.from({ length: 2 * count }, normal),
    y: labels && index.map((i) => (random() < 0.1 ? none : labels[i])),
  };
}
