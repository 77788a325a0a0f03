// What network.js asks: eps_theta(x_t, t) of a model, computed by ONNX Runtime in this worker.
// An answer {error} has a sentence, or "" if ONNX Runtime could not be loaded.

const models = []; // {session, shape, classes} of each number
let ort; // ONNX Runtime
let last = Promise.resolve(); // the answer before, because ONNX Runtime computes one at a time

/** What a promise of ONNX Runtime gives. Its errors are for the console. */
const told = (promise) => promise.catch((error) => {
  console.warn(error?.message ?? error);
  throw new Error("ONNX Runtime cannot run it");
});

/** Open a model, with ONNX Runtime from the first of two folders that has it. Compare the eps of an
 * example with the answer in the file, as sample.py does on CUDA. */
async function start({ number, bytes, folders, T, values, shape, classes }) {
  const load = (folder) => import(`${folder}ort.wasm.bundle.min.mjs`);
  const lose = () => { throw new Error(""); };
  ort ??= await load(folders[0]).catch(() => load(folders[1])).catch(lose);
  const session = await told(ort.InferenceSession.create(bytes, { logSeverityLevel: 4 }));
  models[number] = { session, shape, classes };
  const size = shape.reduce((product, side) => product * side), apart = Math.ceil(size / 64);
  const x = Float32Array.from({ length: size }, (_, k) => Math.SQRT2 * Math.sin(k));
  const answer = await eps({ number, x, t: Math.floor(T / 2) });
  const wrong = Math.hypot(...values.map((value, k) => answer.eps[k * apart] - value));
  const error = (100 * wrong) / Math.hypot(...values);
  if (!values.length || error < 5) return {};
  throw new Error(`it computes an eps that is wrong by ${error.toFixed(0)} %`);
}

async function eps({ number, x, t, y }) {
  const { session, shape, classes } = models[number];
  const batch = x.length / (shape[0] * shape[1] * shape[2]);
  const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [batch]);
  const feeds = { x_t: new ort.Tensor("float32", x, [batch, ...shape]) };
  feeds.t = integers(Array(batch).fill(t));
  if (classes.length) feeds.y = integers(y ?? Array(batch).fill(classes.length));
  const { data } = (await told(session.run(feeds))).eps;
  if (!data.every(Number.isFinite)) throw new Error(`eps is not finite at level ${t + 1}`);
  return { eps: data.slice() }; // a copy, because the runtime may use its memory again
}

async function close({ number }) {
  await models[number]?.session.release();
  delete models[number];
  return {};
}

/** Answer a question: {bytes, ...} opens a model, {x, t, y} asks for its eps, and {} closes it. */
async function answer(question) {
  try {
    return await (question.bytes ? start : question.x ? eps : close)(question);
  } catch ({ message }) {
    return { error: message };
  }
}

self.onmessage = ({ data }) => {
  last = last.then(async () => self.postMessage(await answer(data)));
};
