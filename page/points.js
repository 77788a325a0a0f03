// Points in the plane: clouds of points, and the exact noise prediction for them. Nothing is trained:
// for points, E[eps | x_t] has a closed form.
// Numbers in brackets are equations of the paper. B points are a Float32Array of 2 B numbers.

import { uniform } from "./sampler.js";

export const STD = 0.02; // of the Gaussian around each point of the data

/** The probability of each centre, given x_t = (x, y), into `weights`: that x_t came from there. */
export function posterior(x, y, abar, centres, std, weights = new Float64Array(centres.length / 2)) {
  const signal = Math.sqrt(abar), variance = abar * std ** 2 + 1 - abar; // of each Gaussian at t
  let largest = -Infinity, total = 0;
  for (let m = 0; m < weights.length; m++) {
    const square = (x - signal * centres[2 * m]) ** 2 + (y - signal * centres[2 * m + 1]) ** 2;
    weights[m] = -square / (2 * variance);
    largest = Math.max(largest, weights[m]);
  }
  for (let m = 0; m < weights.length; m++) total += weights[m] = Math.exp(weights[m] - largest);
  for (let m = 0; m < weights.length; m++) weights[m] /= total;
  return weights;
}

/** E[eps | x_t] for a mixture of Gaussians with these centres, of the deviation std. */
export function exactEps(x, abar, centres, std) {
  const signal = Math.sqrt(abar), scale = Math.sqrt(1 - abar) / (abar * std ** 2 + 1 - abar);
  const eps = new Float32Array(x.length), weights = new Float64Array(centres.length / 2);
  for (let k = 0; k < x.length; k += 2) {
    posterior(x[k], x[k + 1], abar, centres, std, weights);
    let right = 0, up = 0; // the mean offset from the centres
    for (let m = 0; m < weights.length; m++) {
      right += weights[m] * (x[k] - signal * centres[2 * m]);
      up += weights[m] * (x[k + 1] - signal * centres[2 * m + 1]);
    }
    eps[k] = scale * right;
    eps[k + 1] = scale * up;
  }
  return eps;
}

/** The density of x_t on a grid of n rows over the view, from the top left, up to a factor. wide: the
 * width of the view, relative to its height. limit: of the view, upwards. */
export function density(n, abar, centres, std, wide, limit) {
  const variance = abar * std ** 2 + 1 - abar, signal = Math.sqrt(abar), columns = Math.round(n * wide);
  const q = new Float64Array(n * columns);
  const bells = (centre, count, end) => Float64Array.from({ length: count }, (_, i) =>
    Math.exp(-((((i + 0.5) / count * 2 - 1) * end - signal * centre) ** 2) / (2 * variance)));
  for (let m = 0; m < centres.length; m += 2) {
    const across = bells(centres[m], columns, limit * wide), down = bells(-centres[m + 1], n, limit);
    const isSeen = (value) => value > 1e-6, first = across.findIndex(isSeen), last = across.findLastIndex(isSeen);
    for (let row = 0; row < n; row++) {
      if (!isSeen(down[row])) continue;
      for (let k = first; k <= last; k++) q[row * columns + k] += down[row] * across[k];
    }
  }
  return q;
}

/** {index, distance} of the centre that is nearest to (x, y). */
export function nearest(x, y, centres) {
  let index = 0, distance = Infinity;
  for (let m = 0; m < centres.length; m += 2) {
    const own = Math.hypot(x - centres[m], y - centres[m + 1]);
    if (own < distance) [distance, index] = [own, m / 2];
  }
  return { index, distance };
}

/** The share of points that are farther than three deviations from each centre. */
export function missed(points, centres, std) {
  const far = points.filter((x, k) => k % 2 === 0 && nearest(x, points[k + 1], centres).distance > 3 * std);
  return (2 * far.length) / points.length;
}

/** Two moons, of which the labels tell the first one, x = 0.6 (cos - 0.5), y = 0.6 (sin - 0.25). */
export function moons(count = 240) {
  const random = uniform(1, 0), points = new Float32Array(2 * count), labels = [];
  for (let k = 0; k < count; k++) {
    const angle = Math.PI * random(), isFirst = random() < 0.5, size = isFirst ? 0.6 : -0.6;
    points.set([size * (Math.cos(angle) - 0.5), size * (Math.sin(angle) - 0.25)], 2 * k);
    labels.push(Number(isFirst));
  }
  return Object.assign(points, { labels });
}
