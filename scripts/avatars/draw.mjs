// Draws avatar pictures, the same ones every time: a domain (a DiceBear style and its options), a seed prefix and a number
// name a picture for ever. It makes the source domain, the four targets and their held-out pictures.
//
//   npm ci
//   node draw.mjs --domain source --count 56000 --prefix train --out ../../data/source
//   node draw.mjs --domain toonHead --count 2000 --prefix heldout --out ../../data/heldout/toonHead
//   node draw.mjs --domain toonHead --count 10 --prefix target --out ../../unidad/assets/targets/toonHead
//   node draw.mjs --domain source --count 8000 --captions --out ../../data/told    # what each shows, in metadata.jsonl
//   node draw.mjs --domain bottts --count 1000 --prefix recombined --parts-of target --out ../../data/recombined/bottts
//                                                                 # only parts and colours that the ten pictures show
import { createAvatar } from '@dicebear/core';
import * as collection from '@dicebear/collection';
import { Resvg } from '@resvg/resvg-js';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { caption } from './captions.mjs';

const DOMAINS = {
  source: ['avataaars', {}],
  sunglasses: ['avataaars', { accessories: ['sunglasses'], accessoriesProbability: 100 }],
  toonHead: ['toonHead', {}],
  bottts: ['bottts', {}],
  lorelei: ['lorelei', {}],
};
const BACKGROUNDS = ['b6e3f4', 'c0aede', 'd1d4f9', 'ffd5dc', 'ffdfbf'];

const { values: options } = parseArgs({
  options: {
    domain: { type: 'string' },
    count: { type: 'string', default: '10' },
    start: { type: 'string', default: '0' },
    prefix: { type: 'string', default: 'train' },
    size: { type: 'string', default: '128' },
    captions: { type: 'boolean', default: false },
    'parts-of': { type: 'string' },
    out: { type: 'string' },
  },
});

function refuse(sentence) {
  console.error(`draw.mjs: ${sentence}`);
  process.exit(2);
}

if (!(options.domain in DOMAINS)) refuse(`--domain must be one of ${Object.keys(DOMAINS).join(', ')}, not ${options.domain}`);
if (!options.out) refuse('--out FOLDER is needed');
const [count, start, size] = [options.count, options.start, options.size].map(Number);
if (![count, start, size].every(Number.isInteger) || count < 1 || start < 0 || size < 8) refuse('--count, --start and --size must be whole numbers');

function write(file, content) {
  writeFileSync(`${file}.part`, content);
  renameSync(`${file}.part`, file);
}

// Lines of a metadata.jsonl that is there already, by the picture they tell of.
function told(file) {
  const lines = existsSync(file) ? readFileSync(file, 'utf8').split('\n').filter((line) => line.trim()) : [];
  return new Map(lines.map((line) => [JSON.parse(line).file_name, line]));
}

const [styleName, styleOptions] = DOMAINS[options.domain];

// DiceBear's generator gives neighbouring seeds alike pictures, so the name is hashed first.
const avatarOf = (name, more) => {
  const seed = createHash('sha256').update(name).digest('hex');
  return createAvatar(collection[styleName], { seed, size, backgroundColor: BACKGROUNDS, ...styleOptions, ...more });
};
const nameOf = (prefix, i) => `${prefix}-${String(i).padStart(6, '0')}`;

// Options that allow only what the ten pictures of that prefix show; a part that some of them lack is as rare as in them.
function partsOf(prefix) {
  const shown = Array.from({ length: 10 }, (_, i) => avatarOf(nameOf(prefix, i)).toJson().extra);
  const parts = {};
  for (const part of Object.keys(shown[0]).filter((key) => !/[bB]ackground/.test(key))) {
    const values = shown.map((extra) => extra[part]).filter((value) => value !== undefined);
    parts[part] = [...new Set(values.map((value) => String(value).replace('#', '')))];
    parts[`${part}Probability`] = 10 * values.length;
  }
  return parts;
}

const allowed = options['parts-of'] ? partsOf(options['parts-of']) : {};
mkdirSync(options.out, { recursive: true });
const metadata = join(options.out, 'metadata.jsonl');
const captions = told(metadata);
for (let i = start; i < start + count; i++) {
  const name = nameOf(options.prefix, i);
  const file = join(options.out, `${name}.png`);
  if (existsSync(file) && !options.captions) continue;
  const avatar = avatarOf(name, allowed);
  if (options.captions) {
    const text = caption(styleName, avatar.toJson().extra);
    captions.set(`${name}.png`, JSON.stringify({ file_name: `${name}.png`, text }));
  }
  if (existsSync(file)) continue;
  write(file, new Resvg(avatar.toString(), { fitTo: { mode: 'width', value: size }, background: 'white' }).render().asPng());
}
if (options.captions) write(metadata, `${[...captions.values()].join('\n')}\n`);
