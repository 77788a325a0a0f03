// Points in the plane: clouds of points, and the exact noise prediction for them. Nothing is trained:
// for points, E[eps | x_t] has a closed form.
//
// Numbers in brackets are equations of the paper. B points are a Float32Array of 2 B numbers.

import { uniform } from "./sampler.js";

export const STD = 0.02; // of the Gaussian around each point of the data
export const LIMIT = 2.3; // of the view, upwards

// ------------------------------------------------------------------------------------- closed forms

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
export function density(n, abar, centres, std, wide = 1, limit = LIMIT) {
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

/** {off, reached}: how many points are farther than three deviations from each centre, and how many
 * centres are the nearest one of some of the others. */
export function judged(points, centres, std) {
  const reached = new Set();
  let off = 0;
  for (let k = 0; k < points.length; k += 2) {
    const { index, distance } = nearest(points[k], points[k + 1], centres);
    if (distance > 3 * std) off++;
    else reached.add(index);
  }
  return { off, reached: reached.size };
}

// --------------------------------------------------------------------------------- clouds of points

/** `count` points by a function of three uniform numbers that returns [x, y]. */
function cloud(count, place) {
  const random = uniform(1, 0);
  return Float32Array.from(Array.from({ length: count }, () => place(random(), random(), random())).flat());
}

/** Two moons, of which the labels tell the first one, x = 0.6 (cos - 0.5), y = 0.6 (sin - 0.25). */
function moons() {
  const points = cloud(240, (a, b) => {
    const [x, y] = [Math.cos(Math.PI * a), Math.sin(Math.PI * a)];
    return b < 0.5 ? [0.6 * (x - 0.5), 0.6 * (y - 0.25)] : [0.6 * (0.5 - x), 0.6 * (0.25 - y)];
  });
  const isFirst = (x, y) => Math.abs(Math.hypot(x / 0.6 + 0.5, y / 0.6 + 0.25) - 1) < 1e-4 && y / 0.6 + 0.25 >= 0;
  return Object.assign(points, {
    labels: Array.from({ length: 240 }, (_, k) => Number(isFirst(points[2 * k], points[2 * k + 1]))),
  });
}

export const CLOUDS = {
  "two moons": moons,
  "three groups": () => cloud(150, (a, b, c) => {
    const [x, y] = [[-0.6, -0.5], [0, 0.6], [0.6, -0.2]][Math.floor(3 * a)];
    const radius = 0.1 * Math.sqrt(-2 * Math.log(1 - b)); // the Box-Muller transform
    return [x + radius * Math.cos(2 * Math.PI * c), y + radius * Math.sin(2 * Math.PI * c)];
  }),
  "a ring": () => cloud(200, (a) => [0.8 * Math.cos(2 * Math.PI * a), 0.8 * Math.sin(2 * Math.PI * a)]),
  "the letters DDPM": () => {
    const canvas = new OffscreenCanvas(200, 200), context = canvas.getContext("2d"), points = [];
    context.font = "bold 105px sans-serif";
    context.textAlign = "center";
    context.fillText("DD", 100, 90, 190);
    context.fillText("PM", 100, 190, 190);
    const { data } = context.getImageData(0, 0, 200, 200), random = uniform(1, 0);
    while (points.length < 800) {
      const [x, y] = [Math.floor(200 * random()), Math.floor(200 * random())];
      if (data[4 * (200 * y + x) + 3] > 128) points.push(x / 100 - 1, 1 - y / 100);
    }
    return Float32Array.from(points);
  },
  "three to one": () => Float32Array.of(0.7, 0.7, 0.8, 0.6, 0.6, 0.8, -0.7, -0.7),
  "one point": () => Float32Array.of(0.4, 0.3),
};
