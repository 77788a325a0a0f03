// The forward process of ddpm.py; DDIM and the guidance of sample.py. (15) is equation 15 of the
// paper, whose t counts from 1, here from 0. Images: Float32Array in [-1, 1], order (B, C, H, W).

/** The paper's schedule: abar_t, the running products of alpha_t = 1 - beta_t. */
export const T = 1000;
let product = 1;
export const ABAR = Array.from({ length: T }, (_, t) =>
  (product *= 1 - 1e-4 - ((0.02 - 1e-4) * t) / (T - 1)));

/** [sqrt(abar), sqrt(1 - abar)] at a level from -1 (x_0) to T - 1, also between two levels. */
export function partsAt(level) {
  const low = Math.floor(level), at = (t) => (t < 0 ? 1 : ABAR[Math.min(t, T - 1)]);
  const abar = at(low) + (level - low) * (at(low + 1) - at(low));
  return [Math.sqrt(abar), Math.sqrt(1 - abar)];
}

/** The `steps` levels that the reverse process visits, from `first` to about a fiftieth of it. */
export function levelsOf(first, steps) {
  const last = Math.max(1, Math.floor((first + 1) / Math.max(50, steps))) - 1;
  const gaps = Math.max(1, steps - 1);
  return Array.from({ length: steps }, (_, k) => first - Math.floor((k * (first - last)) / gaps));
}

/** The estimate of x_0 by (15), clipped to [-limit, limit]. */
export const predictX0 = (x, eps, abar, limit = Infinity) => x.map((value, k) =>
  Math.min(limit, Math.max(-limit, (value - Math.sqrt(1 - abar) * eps[k]) / Math.sqrt(abar))));

/** The eps at which x0 is the estimate (15). */
export function epsFrom(x, x0, t) {
  const [signal, spread] = partsAt(t);
  return x.map((value, k) => (value - signal * x0[k]) / spread);
}

/** x_s after a step from x_t with the estimate x0, for s = -1 too. */
function after(x, x0, t, s) {
  const [signal, spread] = partsAt(t), [signalOfS, spreadOfS] = partsAt(s);
  return x.map((value, k) => signalOfS * x0[k] + (spreadOfS / spread) * (value - signal * x0[k]));
}

/** The loop of sample.py, as an async generator: yields {t, s, x, x0, end} of each of `steps` steps
 * from t = `first` down to s. x is x_t, and end x_s; x0 is the estimate of the images, clipped to
 * [-1, 1] if `clip`, and the last one is the sample. eps(x, t) is the noise in x, or a promise. */
export async function* reverse(eps, x, first, steps, clip = true) {
  const levels = levelsOf(first, steps);
  for (const [k, t] of levels.entries()) {
    const s = levels[k + 1] ?? -1;
    const x0 = predictX0(x, await eps(x, t), ABAR[t], clip ? 1 : Infinity);
    const end = after(x, x0, t, s);
    yield { t, s, x, x0, end };
    x = end;
  }
}

/** {x, x0, level} at a level on the way of these steps, on a straight line between two of them. */
export function stateAt(steps, level) {
  const { t, s, x, x0, end } = steps.findLast((step) => step.t >= level) ?? steps[0];
  const share = Math.max(0, (t - level) / (t - s));
  return { x: x.map((value, k) => value + share * (end[k] - value)), x0, level };
}

/** eps(x, t) of classifier-free guidance: (1 + w) eps given the classes y, minus w eps without. */
export const guided = (network, y, w) => async (x, t) => {
  const given = await network.eps(x, t, y), without = w === 0 ? given : await network.eps(x, t);
  return given.map((value, k) => (1 + w) * value - w * without[k]);
};

/** A standard normal number by the Box-Muller transform. random: a function of `uniform`. */
export const normal = (random) =>
  Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());

/** `batch` images of `size` standard normal numbers; those of image k depend on seed and k only. */
export function noiseOf(seed, batch, size) {
  const streams = Array.from({ length: batch }, (_, k) => uniform(seed, k));
  const draw = (_, k) => normal(streams[Math.floor(k / size)]);
  return Float32Array.from({ length: batch * size }, draw);
}

/** A function that draws from [0, 1): sfc32 of PractRand, seeded with two integers. */
export function uniform(seed, stream) {
  let a = seed >>> 0, b = stream >>> 0, c = Math.floor(seed / 2 ** 32), counter = 1;
  const next = () => {
    const sum = (a + b + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = ((c << 21) | (c >>> 11)) + sum;
    return (sum >>> 0) / 2 ** 32;
  };
  for (let k = 0; k < 15; k++) next(); // until the seed has reached all bits
  return next;
}
