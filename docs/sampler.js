// The reverse process of ddpm.py in JavaScript, and eps_theta(x_t, t) from a model.onnx in a worker.
//
// Numbers in brackets are equations of the paper, arXiv:2006.11239. t counts 0..T-1, as in ddpm.py.
// Images are Float32Array in [-1, 1], in the order (B, C, H, W).

// ---------------------------------------------------------------------------- the diffusion process

/** The running products abar_t of alpha_t = 1 - beta_t. */
export function alphasBar(betas) {
  let product = 1;
  return Array.from(betas, (beta) => (product *= 1 - beta));
}

/** x_t ~ q(x_t | x_0) (4): sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise. */
export function qSample(x0, t, noise, betas) {
  const abar = alphasBar(betas)[t];
  const signal = Math.sqrt(abar), deviation = Math.sqrt(1 - abar);
  return x0.map((value, k) => signal * value + deviation * noise[k]);
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
 * sampler: "ddpm" is the paper's Algorithm 2, the default with all T steps; "dpm" is
 * DPM-Solver++(2M), the default with fewer; "ddim" is DDIM.
 * eta: for "ddim" alone, and selects it. 0, the default, is deterministic; 1 equals "ddpm" with
 * "small" variance.
 * xT: where to start; pure noise by default. To continue from an x_t, pass betas.slice(0, t + 1) too.
 */
export async function* sampleProgressive(
  epsModel, drawNoise, betas,
  { variance = "large", steps = betas.length, sampler = null, eta = null, xT } = {},
) {
  const chain = respaced(betas, steps), abars = alphasBar(chain.betas);
  sampler ??= eta !== null ? "ddim" : steps < betas.length ? "dpm" : "ddpm";
  if (!["ddpm", "ddim", "dpm"].includes(sampler)) throw new RangeError(`no sampler ${sampler}`);
  if (eta !== null && sampler !== "ddim") throw new RangeError("eta is for ddim alone");
  const logSNR = abars.map((abar) => Math.log(abar / (1 - abar)));
  let x = xT ?? drawNoise(), x0Before = null;
  for (let i = steps - 1; i >= 0; i--) {
    const beta = chain.betas[i], abar = abars[i], abarPrev = i ? abars[i - 1] : 1;
    const posteriorVariance = ((1 - abarPrev) / (1 - abar)) * beta; // (7), 0 in the last step
    const large = i && variance === "large"; // the last step adds no noise
    const sigma = sampler === "ddpm" ? Math.sqrt(large ? beta : posteriorVariance)
      : (eta ?? 0) * Math.sqrt(posteriorVariance);
    const eps = await epsModel(x, chain.tau[i]);
    const toX0 = (value, k) => (value - Math.sqrt(1 - abar) * eps[k]) / Math.sqrt(abar); // (15)
    const x0 = x.map((value, k) => Math.min(1, Math.max(-1, toX0(value, k))));
    yield { t: chain.tau[i], x, x0, sigma };
    if (i === 0) return;
    let fromX0, fromX; // the mean is fromX0 x_0 + fromX x_t
    if (sampler === "ddpm") { // (7)
      fromX0 = (Math.sqrt(abarPrev) * beta) / (1 - abar);
      fromX = (Math.sqrt(1 - beta) * (1 - abarPrev)) / (1 - abar);
    } else { // DDIM, with eps recomputed from the clipped x_0
      fromX = Math.sqrt((1 - abarPrev - sigma ** 2) / (1 - abar));
      fromX0 = Math.sqrt(abarPrev) - Math.sqrt(abar) * fromX;
    }
    let x0Middle = x0; // "dpm" extrapolates x0_hat to the middle of the step in lambda
    if (sampler === "dpm" && x0Before) {
      const h = logSNR[i - 1] - logSNR[i], hBefore = logSNR[i] - logSNR[i + 1];
      x0Middle = x0.map((value, k) => value + (h / (2 * hBefore)) * (value - x0Before[k]));
    }
    x0Before = x0;
    const z = sigma ? drawNoise() : null;
    x = x.map((value, k) => fromX0 * x0Middle[k] + fromX * value + (z ? sigma * z[k] : 0));
  }
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

/** Uniform numbers in [0, 1) by the generator sfc32 of PractRand, seeded with two integers. */
function uniform(seed, stream) {
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

// -------------------------------------------------------------------------------------- the network

/** The metadata_props of a ModelProto (its field 14) as an object of strings. */
export function readMetadata(bytes) {
  const props = {}, text = new TextDecoder();
  for (const [field, prop] of fields(bytes)) {
    if (field !== 14) continue;
    const { 1: key, 2: value } = Object.fromEntries(fields(prop));
    props[text.decode(key)] = text.decode(value ?? new Uint8Array());
  }
  return props;
}

/** The fields of a protobuf message: [number, bytes], bytes being undefined for a plain number. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1;
    for (;;) {
      if (at >= bytes.length || scale > 2 ** 63) throw new Error("it is not an ONNX file");
      const byte = bytes[at++];
      value += (byte & 127) * scale; // a shift would overflow 32 bits
      scale *= 128;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint(), type = tag % 8;
    let content;
    if (type === 0) varint();
    else if (type === 1) at += 8;
    else if (type === 5) at += 4;
    else if (type === 2) {
      const length = varint();
      content = bytes.subarray(at, (at += length));
    } else throw new Error("it is not an ONNX file");
    if (at > bytes.length) throw new Error("it is cut off");
    yield [Math.floor(tag / 8), content];
  }
}

/**
 * eps_theta(x_t, t) from the bytes of a model.onnx, computed in a worker.
 *
 *     const network = await Network.open(bytes, "https://.../ort.webgpu.bundle.min.mjs");
 *     const eps = await network.eps(x, t); // for any whole number of images
 *
 * betas, variance, shape ([C, H, W]) and classes (their names, [] if there are none) are the file's;
 * metadata is all that it says about itself.
 * device says what the network runs on, and noWebGPU why that is not WebGPU, if it is not.
 * Errors are thrown as an Error whose message is a sentence for the user.
 */
export class Network {
  static async open(bytes, runtime) {
    const network = new Network();
    network.#read(bytes);
    network.#worker = new Worker(import.meta.url, { type: "module" });
    network.#worker.onmessage = ({ data }) => network.#answer(data);
    network.#worker.onerror = (event) => {
      event.preventDefault();
      network.#answer({ error: event.message ?? "the worker did not start" });
    };
    try {
      const { shape, classes } = network;
      const { device, noWebGPU } = await network.#ask({ bytes, runtime, shape, classes });
      return Object.assign(network, { device, noWebGPU });
    } catch (error) {
      network.close();
      throw error;
    }
  }

  #worker;
  #waiting = []; // [resolve, reject] of each question, in order

  #read(bytes) {
    this.metadata = readMetadata(bytes);
    const names = ["ddpm.betas", "ddpm.variance", "ddpm.image_shape"];
    const missing = names.filter((name) => !(name in this.metadata));
    if (missing.length) throw new Error(`its metadata lacks ${missing.join(", ")}`);
    [this.betas, this.shape] = [JSON.parse(this.metadata[names[0]]), JSON.parse(this.metadata[names[2]])];
    this.variance = this.metadata[names[1]];
    this.classes = JSON.parse(this.metadata["ddpm.classes"] ?? "[]");
    const valid = Array.isArray(this.betas) && this.betas.length &&
      this.betas.every((beta) => beta > 0 && beta < 1) &&
      ["large", "small"].includes(this.variance) &&
      this.shape?.length === 3 && [1, 3].includes(this.shape[0]);
    if (!valid) throw new Error("its metadata makes no sense");
    this.size = this.shape[0] * this.shape[1] * this.shape[2];
  }

  #ask(question) {
    return new Promise((...callbacks) => {
      if (!this.#worker) throw new Error("the network was closed");
      this.#waiting.push(callbacks);
      this.#worker.postMessage(question);
    });
  }

  #answer(data) {
    const [resolve, reject] = this.#waiting.shift() ?? [];
    if (data.error) reject?.(new Error(data.error));
    else resolve?.(data);
  }

  /**
   * x: Float32Array of B images. t: an integer. y: B classes, by default "no class"; a network
   * without classes ignores them. The result is shaped like x.
   */
  async eps(x, t, y) {
    const { eps } = await this.#ask({ x, t, y });
    return eps;
  }

  /** Free the memory; calls that wait for an answer fail. */
  close() {
    this.#worker?.terminate();
    this.#worker = null;
    while (this.#waiting.length) this.#answer({ error: "the network was closed" });
  }
}

// ------------------------------------------------------------------------------------- in the worker

let ort, session, shape, classes;

async function start({ bytes, runtime, ...file }) {
  ort = await import(runtime);
  ({ shape, classes } = file);
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  const create = (provider) => ort.InferenceSession.create(bytes, {
    executionProviders: [provider], logSeverityLevel: 4, // the errors are thrown
  });
  const zeros = new Float32Array(shape[0] * shape[1] * shape[2]);
  let noWebGPU = "this browser has no WebGPU";
  if (await navigator.gpu?.requestAdapter().catch(() => null)) {
    try {
      session = await create("webgpu");
      await eps({ x: zeros, t: 0 });
      return { device: "WebGPU" };
    } catch (error) {
      noWebGPU = `WebGPU fails: ${error.message}`;
    }
  } else if (navigator.gpu) noWebGPU = "WebGPU finds no device";
  session = await create("wasm");
  await eps({ x: zeros, t: 0 });
  const threads = ort.env.wasm.numThreads;
  return { device: `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`, noWebGPU };
}

async function eps({ x, t, y }) {
  const batch = x.length / (shape[0] * shape[1] * shape[2]);
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
  const feeds = {
    x_t: new ort.Tensor("float32", x, [batch, ...shape]),
    t: integers(Array(batch).fill(t)),
  };
  if (classes.length) feeds.y = integers(y ?? Array(batch).fill(classes.length));
  const results = await session.run(feeds);
  const result = await results.eps.getData();
  if (!result.every(Number.isFinite)) throw new Error(`eps is not finite at t = ${t}`);
  return { eps: result.slice() }; // a copy, because the runtime may use its memory again
}

if (typeof WorkerGlobalScope !== "undefined" && self instanceof WorkerGlobalScope) {
  self.onmessage = async ({ data }) => {
    try {
      self.postMessage(await (data.bytes ? start(data) : eps(data)));
    } catch (error) {
      self.postMessage({ error: String(error?.message ?? error) });
    }
  };
}
