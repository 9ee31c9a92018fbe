// Numbers, times and shares as a person reads them: three significant figures, no unit left out.
// It knows no element of the page.

const SCALES = [
  [1e12, "T"],
  [1e9, "G"],
  [1e6, "M"],
  [1e3, "k"],
];

/** 0.182, 31.9, 12.3k, 1.20e-5; a dash for what is not a number. */
export function number(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(2);
  // 999.6 rounds to 1000, which would have four figures.
  const scale = SCALES.find(([unit]) => size >= unit * 0.9995);
  if (!scale) return value.toPrecision(3);
  if (size < 1e15) return (value / scale[0]).toPrecision(3) + scale[1];
  return value.toExponential(2);
}

/** 0.110 %, 4.20 %, 42.0 %, 100 %. */
export function percent(fraction) {
  if (typeof fraction !== "number" || !Number.isFinite(fraction)) return "–";
  const value = fraction * 100;
  // Never "100 %" before it is all done.
  if (fraction < 1 && value >= 99.95) return "99.9 %";
  if (value < 0.001) return "0 %";
  return `${value.toPrecision(3)} %`;
}

/** 0.4 s, 58 s, 1 min 20 s, 2 h 5 min, 3 d 4 h. */
export function duration(seconds) {
  if (typeof seconds !== "number" || !Number.isFinite(seconds) || seconds < 0) return "–";
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return join(Math.floor(whole / 60), "min", whole % 60, "s");
  if (whole < 86400) return join(Math.floor(whole / 3600), "h", Math.floor((whole % 3600) / 60), "min");
  return join(Math.floor(whole / 86400), "d", Math.floor((whole % 86400) / 3600), "h");
}

function join(large, largeUnit, small, smallUnit) {
  return small ? `${large} ${largeUnit} ${small} ${smallUnit}` : `${large} ${largeUnit}`;
}

/** 12.3k tokens/s, 3.20 MB/s. */
export function rate(perSecond, unit) {
  const figure = number(perSecond);
  if (unit !== "bytes") return unit ? `${figure} ${unit}/s` : `${figure}/s`;
  const [, digits, scale] = figure.match(/^(.*?)([a-zA-Z]?)$/);
  return `${digits} ${scale}B/s`;
}

/** 1,048,576: a count, exact. */
export function count(value) {
  return value.toLocaleString("en");
}

/** 14:03:22, in the reader's own time and manner. */
export function clock(date) {
  return date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
}
