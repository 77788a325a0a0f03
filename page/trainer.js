// Algorithm 1 for points in the plane, in plain JavaScript: the batch, the loss (14), its gradient,
// Adam, and the average of the weights. B points are a Float32Array of 2 B numbers.

import { STD } from "./points.js";
import { ABAR, T, normal, partsAt, uniform } from "./sampler.js";

const WAVES = [3, 6, 12, 24]; // frequencies of sines of x_t, by which fine detail is learnt sooner
const HALF = 8, INPUTS = 2 + 4 * WAVES.length + 2 * HALF, WIDTH = 64; // WIDTH: of the hidden layers
const BATCH = 128, random = uniform(1, 0);
const RATE = 0.012, DECAY = 0.999; // the learning rate at first, and the decay of the average
const EMBEDDING = ABAR.map((abar) => { // sines and cosines of half of log SNR
  const half = Math.log(abar / (1 - abar)) / 2;
  const angles = Array.from({ length: HALF }, (_, k) => 0.15 * (k + 1) * half);
  return [...angles.map(Math.sin), ...angles.map(Math.cos)];
});

/** y = x W + b for B rows. W is stored by rows, (n, m). */
function affine(x, W, b) {
  const m = b.length, n = W.length / m, B = x.length / n, y = new Float32Array(B * m);
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
const siluBackward = (x, dy) =>
  x.map((value, k) => dy[k] * sigmoid(value) * (1 + value * (1 - sigmoid(value))));

/** What the network reads of each point: x_t, sines of it, and the embedding of t. */
function features(x, t) {
  const rows = new Float32Array(t.length * INPUTS);
  t.forEach((level, i) => {
    const point = [x[2 * i], x[2 * i + 1]];
    const waves = (f) => WAVES.flatMap((w) => point.map((value) => f(w * value)));
    const row = [point.map((value) => 4 * value), waves(Math.sin), waves(Math.cos)];
    rows.set([...row, EMBEDDING[level]].flat(), i * INPUTS);
  });
  return rows;
}

const partsOf = (t) => t.map((level) => partsAt(level));

/** eps_theta(x_t, t), with a t for each point, and the layers before it, for the gradient. */
function forward([W1, b1, W2, b2, W3, b3], x, t) {
  const rows = features(x, t), a1 = affine(rows, W1, b1), h1 = silu(a1);
  const a2 = affine(h1, W2, b2), h2 = silu(a2), v = affine(h2, W3, b3), parts = partsOf(t);
  const eps = v.map((value, k) => parts[k >> 1][0] * value + parts[k >> 1][1] * x[k]);
  return { rows, a1, h1, a2, h2, eps };
}

/** eps_theta(x_t, t) of the network with these parameters, with the same t for all points. */
export const epsOf = (parameters, x, t) =>
  forward(parameters, x, Array(x.length / 2).fill(t)).eps;

const zeros = (n) => new Float32Array(n);

/** W1, b1, W2, b2, W3, b3 of an untrained network, whose last layer is 0. */
function untrained() {
  const random = uniform(0, 0);
  const glorot = (n, m) => zeros(n * m).map(() => (2 * random() - 1) * Math.sqrt(6 / (n + m)));
  return [glorot(INPUTS, WIDTH), zeros(WIDTH), glorot(WIDTH, WIDTH), zeros(WIDTH),
    zeros(2 * WIDTH), zeros(2)];
}

/** A network of two hidden layers, and its training from the given parameters. Its output is v
 * (Salimans and Ho 2022), with eps = sqrt(abar) v + sqrt(1 - abar) x_t, but the loss is of eps. */
export class Trainer {
  constructor(parameters = untrained()) {
    this.steps = 0;
    this.parameters = parameters;
    this.first = parameters.map((p) => zeros(p.length)); // Adam's averages of the gradient
    this.second = parameters.map((p) => zeros(p.length)); // and of its square
    this.average = parameters.map((p) => p.slice());
  }

  /** A gradient step of Algorithm 1 on a batch of `draw`, with the loss (14). */
  step({ x0, t, noise }) {
    const gradient = this.parameters.map((p) => zeros(p.length));
    const [W1, , W2, , W3] = this.parameters, [dW1, db1, dW2, db2, dW3, db3] = gradient;
    const parts = partsOf(t), { length } = noise;
    const xt = x0.map((value, k) => parts[k >> 1][0] * value + parts[k >> 1][1] * noise[k]); // (4)
    const { rows, a1, h1, a2, h2, eps } = forward(this.parameters, xt, t);
    const dV = eps.map((value, k) => (2 * parts[k >> 1][0] * (value - noise[k])) / length);
    const dA2 = siluBackward(a2, affineBackward(h2, W3, dV, dW3, db3));
    const dA1 = siluBackward(a1, affineBackward(h1, W2, dA2, dW2, db2));
    affineBackward(rows, W1, dA1, dW1, db1);
    this.adam(gradient);
  }

  /** Adam, whose learning rate is halved by step 1000, and the average of the weights. */
  adam(gradient) {
    const rate = RATE / (1 + this.steps / 1000), k = ++this.steps;
    const decay = Math.min(DECAY, k / (9 + k)); // as in train.py
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

/** The random part of a step: x_0 (one of the points plus a Gaussian of deviation STD), t, noise. */
export function draw(points) {
  const index = Array.from({ length: BATCH }, () => Math.floor((random() * points.length) / 2));
  const filled = (value) => Float32Array.from({ length: 2 * BATCH }, (_, k) => value(k));
  return {
    x0: filled((k) => points[2 * index[k >> 1] + (k % 2)] + STD * normal(random)),
    t: index.map(() => Math.floor(T * random())),
    noise: filled(() => normal(random)),
  };
}
