// The diffusion process of ddpm.py in JavaScript: the forward process, the samplers, guidance.
//
// Numbers in brackets are equations of the paper, arXiv:2006.11239. t counts 0..T-1, as in ddpm.py.
// Images are Float32Array in [-1, 1], in the order (B, C, H, W).

// ---------------------------------------------------------------------------- the diffusion process

/** The paper's betas: T numbers from beta_1 to beta_T. */
export function linearBetas(T = 1000, beta1 = 1e-4, betaT = 0.02) {
  return Array.from({ length: T }, (_, t) => beta1 + ((betaT - beta1) * t) / Math.max(1, T - 1));
}

/** The running products abar_t of alpha_t = 1 - beta_t. */
export function alphasBar(betas) {
  let product = 1;
  return Array.from(betas, (beta) => (product *= 1 - beta));
}

/** The paper's schedule. */
export const BETAS = linearBetas(), T = BETAS.length, ABAR = alphasBar(BETAS);

/** x_t ~ q(x_t | x_0) (4): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. */
export function qSample(x0, t, noise, betas) {
  const abar = alphasBar(betas)[t];
  const signal = Math.sqrt(abar), deviation = Math.sqrt(1 - abar);
  return x0.map((value, k) => signal * value + deviation * noise[k]);
}

/** [sqrt(abar), sqrt(1 - abar)] at a level from -1, which is x_0, to T - 1; also between two levels. */
export function partsAt(level) {
  const low = Math.floor(level), at = (t) => (t < 0 ? 1 : ABAR[Math.min(t, T - 1)]);
  const abar = at(low) + (level - low) * (at(low + 1) - at(low));
  return [Math.sqrt(abar), Math.sqrt(1 - abar)];
}

/** x on DDIM's way from a state {t, x, x0} down to a level: the estimate x0 and the noise stay. */
export function between({ t, x, x0 }, level) {
  const [signal, noise] = partsAt(level), [before, rest] = partsAt(t);
  return rest ? x.map((value, k) => signal * x0[k] + (noise / rest) * (value - before * x0[k])) : x;
}

/**
 * A chain through some of the noise levels: {betas, tau}, both of length `steps`. tau lists the
 * t of the full chain that the shorter one visits. Throws a RangeError if steps is not 1..T.
 */
export function respaced(betas, steps) {
  const T = betas.length;
  if (!(steps >= 1 && steps <= T)) throw new RangeError(`steps must be 1..${T}, not ${steps}`);
  const tau = Array.from({ length: steps }, (_, k) => Math.floor((T * (k + 1)) / steps) - 1);
  const abar = alphasBar(betas);
  return { tau, betas: tau.map((t, i) => 1 - abar[t] / (i ? abar[tau[i - 1]] : 1)) };
}

/**
 * The reverse process as an async generator: yields {t, x, x0, sigma} from t = T-1 down.
 *
 * x is x_t, the input of the network; x0 is the current estimate of the clean images, clipped to
 * [-1, 1], and the last one is the sample. sigma is the standard deviation of the noise that is
 * added next.
 *
 * epsModel(x, t) returns eps, or a promise of it. drawNoise() returns the next z.
 * variance: sigma_t^2 is beta_t if "large", the posterior variance (7) if "small".
 * steps: how many of the T steps to take; all by default.
 * sampler: "ddpm" is the paper's Algorithm 2, the default with all T steps; "sa-solver" is SA-Solver
 * without noise, the default with fewer; "ddim" is DDIM.
 * eta: for "ddim" alone, and selects it. 0, the default, is deterministic; 1 equals "ddpm" with
 * "small" variance.
 * xT: where to start; pure noise by default. To continue from an x_t, pass betas.slice(0, t + 1) too.
 * clip: whether x0 is clipped to [-1, 1].
 * known: for inpainting, {x0, mask}, shaped like x. Where the mask is 0, x_t is drawn from
 * q(x_t | x_0) (4) in each step, and x0 is the given one.
 */
export async function* sampleProgressive(
  epsModel, drawNoise, betas,
  { variance = "large", steps = betas.length, sampler = null, eta = null, xT, clip = true, known } = {},
) {
  const fill = (x, given) => (known ? x.map((value, k) => (known.mask[k] ? value : given[k])) : x);
  const chain = respaced(betas, steps), abars = alphasBar(chain.betas);
  sampler ??= eta !== null ? "ddim" : steps < betas.length ? "sa-solver" : "ddpm";
  if (!["ddpm", "ddim", "sa-solver"].includes(sampler)) throw new RangeError(`no sampler ${sampler}`);
  if (eta !== null && sampler !== "ddim") throw new RangeError("eta is for ddim alone");
  const solverStep = saSolverStep(abars);
  let x = xT ?? drawNoise();
  for (let i = steps - 1; i >= 0; i--) {
    const beta = chain.betas[i], abar = abars[i], abarPrev = i ? abars[i - 1] : 1;
    const posteriorVariance = ((1 - abarPrev) / (1 - abar)) * beta; // (7), 0 in the last step
    const large = i && variance === "large"; // the last step adds no noise
    const sigma = sampler === "ddpm" ? Math.sqrt(large ? beta : posteriorVariance)
      : (eta ?? 0) * Math.sqrt(posteriorVariance);
    if (known) x = fill(x, qSample(known.x0, chain.tau[i], drawNoise(), betas));
    const eps = await epsModel(x, chain.tau[i]);
    let x0 = x.map((value, k) => (value - Math.sqrt(1 - abar) * eps[k]) / Math.sqrt(abar)); // (15)
    if (clip) x0 = x0.map((value) => Math.min(1, Math.max(-1, value)));
    x0 = fill(x0, known?.x0);
    yield { t: chain.tau[i], x, x0, sigma };
    if (i === 0) return;
    if (sampler === "sa-solver") {
      x = solverStep(x0, x, i);
      continue;
    }
    let fromX0, fromX; // the mean is fromX0 x_0 + fromX x_t
    if (sampler === "ddpm") { // (7)
      fromX0 = (Math.sqrt(abarPrev) * beta) / (1 - abar);
      fromX = (Math.sqrt(1 - beta) * (1 - abarPrev)) / (1 - abar);
    } else { // DDIM, with eps recomputed from the clipped x_0
      fromX = Math.sqrt((1 - abarPrev - sigma ** 2) / (1 - abar));
      fromX0 = Math.sqrt(abarPrev) - Math.sqrt(abar) * fromX;
    }
    const z = sigma ? drawNoise() : null;
    x = x.map((value, k) => fromX0 * x0[k] + fromX * value + (z ? sigma * z[k] : 0));
  }
}

/**
 * The weights c of: integral from start to end of e^(s - end) x0(s) ds = sum of c_k x0_k. x0(s) is
 * the polynomial through the points (nodes[k], x0_k).
 */
export function nodeWeights(nodes, start, end) {
  const h = end - start, moments = [-Math.expm1(-h)]; // the integrals of e^u u^k from -h to 0
  for (let k = 1; k < nodes.length; k++) moments.push(-Math.exp(-h) * (-h) ** k - k * moments[k - 1]);
  return nodes.map((node) => {
    let powers = [1]; // the coefficients of Lagrange's polynomial, which is 1 at this node
    for (const other of nodes) {
      if (other === node) continue; // multiply it by (u - other) / (node - other)
      const lower = [0, ...powers], same = [...powers, 0];
      powers = lower.map((value, k) => (value - (other - end) * same[k]) / (node - other));
    }
    return powers.reduce((sum, power, k) => sum + moments[k] * power, 0);
  });
}

/** The function step(x0, x, t), which returns x_{t-1}, of SA-Solver without noise: that of beyond.py. */
function saSolverStep(abar, order = 3) {
  const lambda = abar.map((value) => Math.log(value / (1 - value)) / 2);
  const signal = abar.map(Math.sqrt), spread = abar.map((value) => Math.sqrt(1 - value));
  const nodes = [], estimates = []; // the latest first
  let begin = null; // where the last step began
  const solve = (x, before, after) => { // x at the level `after`, from x at the level `before`
    const weights = nodeWeights(nodes, lambda[before], lambda[after]);
    return x.map((value, k) => estimates.reduce(
      (sum, x0, n) => sum + signal[after] * weights[n] * x0[k],
      (spread[after] / spread[before]) * value));
  };
  return (x0, x, t) => {
    nodes.unshift(lambda[t]);
    estimates.unshift(x0);
    nodes.length = estimates.length = Math.min(order, nodes.length);
    begin = begin ? solve(begin, t + 1, t) : x;
    return solve(begin, t, t - 1);
  };
}

/**
 * sampleProgressive, broken on purpose, as the exercises of ddpm.ipynb do. t counts the levels of
 * `betas`, as before.
 *
 * withoutZ: no noise is added to the mean of p.
 * short: a tenth of the T steps, with betas from the first to the last of the given ones.
 * lastNoise: the last step adds noise as well.
 */
export async function* sampleChanged(
  epsModel, drawNoise, betas, { withoutZ, short, lastNoise, steps = betas.length, xT, ...options },
) {
  const abar = alphasBar(betas), T = short ? Math.ceil(betas.length / 10) : betas.length;
  const chain = short ? linearBetas(T, betas[0], betas.at(-1)) : betas;
  const level = alphasBar(chain).map((value) => closest(abar, value));
  const noise = xT ?? drawNoise(), zeros = noise.map(() => 0);
  options = { ...options, steps: Math.min(steps, T), xT: noise };
  const drawZ = withoutZ ? () => zeros : drawNoise;
  let done = 0;
  for await (const step of sampleProgressive((x, t) => epsModel(x, level[t]), drawZ, chain, options)) {
    const t = level[step.t];
    if (++done === options.steps && lastNoise) {
      const z = drawNoise(), sigma = Math.sqrt(1 - abar[t]); // of the shorter chain, beta_1 = 1 - abar_1
      yield { ...step, t, sigma, x0: step.x0.map((value, k) => value + sigma * z[k]) };
    } else yield { ...step, t };
  }
}

/** The index of the number that is closest to `value`. */
export function closest(numbers, value) {
  const distances = numbers.map((number) => Math.abs(number - value));
  return distances.indexOf(Math.min(...distances));
}

/**
 * An epsModel(x, t) of classifier-free guidance: (1 + w) eps given the classes y, minus w eps.
 *
 * y has the index of the class of each image; classes.length stands for "no class". w = 0 is no
 * guidance.
 */
export function guided(network, y, w) {
  const none = y.map(() => network.classes.length);
  return async (x, t) => {
    if (w === 0) return network.eps(x, t, y);
    const twice = new Float32Array(2 * x.length);
    twice.set(x);
    twice.set(x, x.length);
    const eps = await network.eps(twice, t, [...y, ...none]);
    return x.map((_, k) => (1 + w) * eps[k] - w * eps[k + x.length]);
  };
}

/**
 * A drawNoise() for `batch` images of `size` numbers each: standard normal. The noise of image k
 * depends on (seed, k) alone.
 */
export function noiseOf(seed, batch, size) {
  const streams = Array.from({ length: batch }, (_, k) => uniform(seed, k));
  return () => {
    const z = new Float32Array(batch * size);
    streams.forEach((next, k) => {
      for (let j = 0; j < size; j += 2) { // the Box-Muller transform gives two at a time
        const radius = Math.sqrt(-2 * Math.log(1 - next())), angle = 2 * Math.PI * next();
        z[k * size + j] = radius * Math.cos(angle);
        if (j + 1 < size) z[k * size + j + 1] = radius * Math.sin(angle);
      }
    });
    return z;
  };
}

/** A function that draws uniform numbers in [0, 1) by the generator sfc32 of PractRand, seeded with two integers. */
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
