// The seed contract (docs/seed-contract.md of ganexport) in JavaScript: the same bits as Python.
// Numbers of JavaScript are binary64 and never fused, so each line is one rounded operation.

const LN2 = 0.6931471805599453;
const SQRT_HALF = 0.7071067811865476;
const TWO_32 = 4294967296;

// Wichura's PPND16 (AS 241), coefficients of r^0 … r^7: numerator, denominator.
const CENTRE = [
  [3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3],
  [1, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3]];
const MIDDLE = [
  [1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
    1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4],
  [1, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9]];
const FAR = [
  [6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7],
  [1, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15]];

function horner(row, r) {
  let value = row[7];
  for (let k = 6; k >= 0; k--) value = value * r + row[k];
  return value;
}

const bits = new DataView(new ArrayBuffer(8));

function log(x) {
  bits.setFloat64(0, x);
  const head = bits.getUint32(0);
  let exponent = ((head >>> 20) & 0x7ff) - 1022;
  bits.setUint32(0, ((head & 0x800fffff) | (1022 << 20)) >>> 0);
  let f = bits.getFloat64(0); // 0.5 <= f < 1, exact
  if (f < SQRT_HALF) { f = f + f; exponent -= 1; }
  const s = (f - 1) / (f + 1);
  const z = s * s;
  let series = 2 / 15;
  for (const odd of [13, 11, 9, 7, 5, 3]) series = series * z + 2 / odd;
  series = series * z + 2;
  return series * s + exponent * LN2;
}

export function quantile(p) {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const r = 0.180625 - q * q;
    return (horner(CENTRE[0], r) / horner(CENTRE[1], r)) * q;
  }
  const r = Math.sqrt(-log(Math.min(p, 1 - p)));
  const [table, y] = r <= 5 ? [MIDDLE, r - 1.6] : [FAR, r - 5];
  const x = horner(table[0], y) / horner(table[1], y);
  return q < 0 ? -x : x;
}

function below(t) {
  let low = 0, high = 0.5;
  for (let k = 0; k < 60; k++) {
    const middle = (low + high) * 0.5;
    if (quantile(middle) < -t) low = middle; else high = middle;
  }
  return high;
}

function high32(a, b) {
  const al = a & 0xffff, ah = a >>> 16, bl = b & 0xffff, bh = b >>> 16;
  const lh = al * bh, hl = ah * bl;
  const middle = ((al * bl) >>> 16) + (lh & 0xffff) + (hl & 0xffff);
  return (ah * bh + (lh >>> 16) + (hl >>> 16) + (middle >>> 16)) >>> 0;
}

function stream(name) {
  let value = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(name)) value = Math.imul(value ^ byte, 0x01000193) >>> 0;
  return value;
}

// Philox4x32-10: `count` words of sample `index` (BigInt) of `seed` (BigInt).
export function words(seed, name, index, count) {
  const out = new Uint32Array(count);
  const s = stream(name);
  const low = Number(index & 0xffffffffn), top = Number(index >> 32n);
  for (let block = 0; block * 4 < count; block++) {
    let c0 = block, c1 = s, c2 = low, c3 = top;
    let k0 = Number(seed & 0xffffffffn), k1 = Number(seed >> 32n);
    for (let round = 0; round < 10; round++) {
      const h0 = high32(c0, 0xd2511f53), l0 = Math.imul(c0, 0xd2511f53) >>> 0;
      const h2 = high32(c2, 0xcd9e8d57), l2 = Math.imul(c2, 0xcd9e8d57) >>> 0;
      [c0, c1, c2, c3] = [(h2 ^ c1 ^ k0) >>> 0, l2, (h0 ^ c3 ^ k1) >>> 0, l0];
      k0 = (k0 + 0x9e3779b9) >>> 0;
      k1 = (k1 + 0xbb67ae85) >>> 0;
    }
    const four = [c0, c1, c2, c3];
    for (let k = 0; k < 4 && block * 4 + k < count; k++) out[block * 4 + k] = four[k];
  }
  return out;
}

// The largest binary32 number below x, itself a binary32 number.
function previous32(x) {
  const view = new DataView(new ArrayBuffer(4));
  view.setFloat32(0, x);
  if (x === 0) return -1.401298464324817e-45;
  view.setInt32(0, view.getInt32(0) + (x > 0 ? -1 : 1));
  return view.getFloat32(0);
}

function valuesOf(sampler, drawn, truncation) {
  if (sampler.type === "normal") {
    const cut = truncation === null ? 0 : below(truncation);
    return Float32Array.from(drawn, (w) => {
      let p = (w + 0.5) * 2 ** -32;
      if (truncation !== null) p = p * (1 - cut - cut) + cut;
      let x = quantile(p);
      if (truncation !== null) x = Math.max(-truncation, Math.min(truncation, x));
      if (sampler.std !== 1) x = x * sampler.std;
      if (sampler.mean !== 0) x = x + sampler.mean;
      return x;
    });
  }
  if (sampler.type === "uniform") {
    const end = Math.fround(sampler.high);
    const last = end >= sampler.high ? previous32(end) : end;
    return Float32Array.from(drawn, (w) =>
      Math.min(Math.fround((w >>> 8) * 2 ** -24 * (sampler.high - sampler.low) + sampler.low), last));
  }
  return Float64Array.from(drawn, (w) => high32(w, sampler.classes)); // label, onehot
}

const ARRAYS = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array };

// Inputs of `count` samples of one seed, from sample `start` on. A spec is that of the manifest.
// Returns { name: { data, dims, type } }; labels: one class for all, or null.
export function latents(spec, { seed = 0n, start = 0n, count = 1, seeds = null, label = null, truncation = null } = {}) {
  const sizes = Object.fromEntries((spec.dims ?? []).map((dim) => [dim.name, dim.opt]));
  const fed = spec.inputs.some((input) => input.name === "truncation");
  if (seeds !== null) count = seeds.length;
  const feeds = {};
  for (const input of spec.inputs) {
    const axis = input.shape.indexOf("batch");
    const one = input.shape.filter((_, k) => k !== axis).map((size) => (typeof size === "string" ? sizes[size] : size));
    const number = axis < 0 ? 1 : count;
    const samples = [];
    for (let k = 0; k < number; k++) {
      const of = seeds === null ? seed : seeds[k];
      const index = axis < 0 ? 0n : seeds === null ? start + BigInt(k) : start;
      samples.push(sample(input, one, of, index, label, fed ? null : truncation, truncation));
    }
    feeds[input.name] = joined(input, one, axis, samples);
  }
  return feeds;
}

function sample(input, shape, seed, index, label, cut, truncation) {
  const sampler = input.sampler;
  const elements = shape.reduce((a, b) => a * b, 1);
  if (input.name === "truncation" && truncation !== null) return new Float64Array(elements).fill(truncation);
  if (sampler.type === "constant") return new Float64Array(elements).fill(sampler.value);
  const rows = sampler.type === "onehot" ? elements / sampler.classes : elements;
  const chosen = label !== null && (sampler.type === "label" || sampler.type === "onehot");
  const values = chosen ? new Float64Array(rows).fill(label) : valuesOf(sampler, words(seed, input.name, index, rows), cut);
  if (sampler.type !== "onehot") return values;
  const hot = new Float64Array(elements);
  values.forEach((value, row) => { hot[row * sampler.classes + value] = 1; });
  return hot;
}

// Samples side by side along the batch axis.
function joined(input, shape, axis, samples) {
  const dims = [...shape];
  if (axis >= 0) dims.splice(axis, 0, samples.length);
  const inner = shape.slice(Math.max(axis, 0)).reduce((a, b) => a * b, 1);
  const data = new ARRAYS[input.dtype](dims.reduce((a, b) => a * b, 1));
  const whole = input.dtype !== "float32", big = input.dtype === "int64";
  samples.forEach((values, k) => values.forEach((value, e) => {
    const place = axis < 0 ? e : (Math.floor(e / inner) * samples.length + k) * inner + (e % inner);
    const rounded = whole ? Math.floor(value) : value;
    data[place] = big ? BigInt(rounded) : rounded;
  }));
  return { data, dims, type: input.dtype };
}
