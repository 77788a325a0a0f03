// Points in the plane, and the exact noise prediction for them. B points are 2 B numbers in a row.

export const STD = 0.02; // of the Gaussian around each point of the data
export const MISS = 3 * STD; // farther from all of them, a point misses the data

/** The probabilities of the centres that a point [x, y] at a level may have come from. */
export function posterior([x, y], abar, centres) {
  const signal = Math.sqrt(abar), variance = abar * STD ** 2 + 1 - abar;
  const logs = new Float64Array(centres.length / 2);
  for (let m = 0; m < logs.length; m++) {
    const right = x - signal * centres[2 * m], up = y - signal * centres[2 * m + 1];
    logs[m] = (right ** 2 + up ** 2) / (-2 * variance);
  }
  const largest = Math.max(...logs); // without it, all might round to 0
  const weights = logs.map((log) => Math.exp(log - largest));
  const total = weights.reduce((sum, weight) => sum + weight);
  return weights.map((weight) => weight / total);
}

/** The mean of centres with these probabilities. */
export function meanOf(weights, centres) {
  const mean = [0, 0];
  for (let k = 0; k < centres.length; k++) mean[k % 2] += weights[k >> 1] * centres[k];
  return mean;
}

/** E[eps | x_t] for a mixture of Gaussians with these centres. x has the points. */
export function exactEps(x, abar, centres) {
  const signal = Math.sqrt(abar), scale = Math.sqrt(1 - abar) / (abar * STD ** 2 + 1 - abar);
  const eps = new Float32Array(x.length);
  for (let k = 0; k < x.length; k += 2) {
    const mean = meanOf(posterior(x.subarray(k, k + 2), abar, centres), centres);
    for (let i = 0; i < 2; i++) eps[k + i] = scale * (x[k + i] - signal * mean[i]);
  }
  return eps;
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

/** How many per cent of the points are far from each centre. */
export function missed(points, centres) {
  const isFar = (x, k) => k % 2 === 0 && nearest(x, points[k + 1], centres).distance > MISS;
  return Math.round((200 * points.filter(isFar).length) / points.length);
}

/** Points [x, y] = at(u) of a curve, for u from 0 to 1. */
const curve = (at, n = 240) =>
  Float32Array.from(Array.from({ length: n }, (_, k) => at(k / n)).flat());
const circle = (angle, radius) => [radius * Math.cos(angle), radius * Math.sin(angle)];

/** Points on two arcs, the first half of them on the upper one; on both, from left to right. */
export const DATA = curve((u) => {
  const isUpper = u < 0.5, [right, up] = circle(2 * Math.PI * (isUpper ? 0.5 - u : u), 0.6);
  return isUpper ? [right - 0.3, up - 0.15] : [right + 0.3, up + 0.15];
});
/** Separate points, evenly spread over a disc. */
const dots = (n) => curve((u) => circle(2.4 * n * u, 0.9 * Math.sqrt(u + 0.5 / n)), n);
export const SHAPES = { arcs: DATA, many: dots(60), few: dots(6) };
