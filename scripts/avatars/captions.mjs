// What an avatar shows, in plain words, from the options it was drawn with: "a person on a pink background, with red hair, a white
// shirt, sunglasses". Few words on purpose: a small text encoder is to know them all.
const COLOURS = {
  black: ['262e33', '151613', '000000', '2c1b18'],
  grey: ['929598', '3c4f5c', '545454', '757575', '546e7a', 'e6e6e6', 'e8e1e1'],
  white: ['ffffff', 'e8e9e6', 'ecdcbf'],
  brown: ['724133', '4a312c', '6d4c41', 'a55728'],
  blond: ['b58143', 'd6b370'],
  red: ['c93305', 'ff5c5c', 'b11f1f', 'e53935', 'f4511e'],
  orange: ['fb8c00', 'f97316', 'ffb300'],
  yellow: ['ffffb1', 'fdd835', 'eab308', 'c0ca33'],
  green: ['a7ffc4', '43a047', '7cb342', '147f3c', '00897b'],
  blue: ['65c9ff', '5199e4', '25557c', 'b1e2ff', 'b6e3f4', '1e88e5', '3949ab', '039be5', '0b3286', '00acc1'],
  violet: ['c0aede', '5e35b1', '8e24aa', '731ac3'],
  lavender: ['d1d4f9'],
  pink: ['ffafb9', 'ff488e', 'ffd5dc', 'f59797', 'd81b60', 'ec4899'],
  peach: ['ffdfbf', 'ffdeb5'],
};

function colour(hex) {
  const found = Object.entries(COLOURS).find(([, all]) => all.includes(hex.replace('#', '')));
  if (!found) throw new Error(`there is no word for the colour ${hex} in captions.mjs`);
  return found[0];
}

function article(words) {
  return `${/^[aeiou]/.test(words) ? 'an' : 'a'} ${words}`;
}

const HATS = { hat: 'hat', hijab: 'hijab', turban: 'turban', winterHat1: 'hat', winterHat02: 'hat', winterHat03: 'hat', winterHat04: 'hat' };
const GLASSES = { sunglasses: 'sunglasses', wayfarers: 'sunglasses', eyepatch: 'an eyepatch' };

function person(made) {
  const hair = made.top in HATS ? article(`${colour(made.hatColor)} ${HATS[made.top]}`) : `${colour(made.hairColor)} hair`;
  const parts = [hair, article(`${colour(made.clothesColor)} shirt`)];
  if (made.accessories) parts.push(GLASSES[made.accessories] ?? 'glasses');
  if (made.facialHair) parts.push(made.facialHair.startsWith('beard') ? 'a beard' : 'a moustache');
  return ['a person', parts];
}

function head(made) {
  const parts = [`${colour(made.hairColor)} hair`, article(`${colour(made.clothesColor)} shirt`)];
  if (made.beard) parts.push(made.beard === 'moustacheTwirl' ? 'a moustache' : 'a beard');
  return ['a cartoon person', parts];
}

function robot(made) {
  return [article(`${colour(made.baseColor)} robot`), []];
}

function drawing(made) {
  const words = { glasses: 'glasses', earrings: 'earrings', beard: 'a beard' };
  return ['a drawing of a person', Object.keys(words).filter((part) => made[part]).map((part) => words[part])];
}

const STYLES = { avataaars: person, toonHead: head, bottts: robot, lorelei: drawing };

// style: DiceBear's name. made: what `createAvatar(...).toJson().extra` says.
export function caption(style, made) {
  const [subject, parts] = STYLES[style](made);
  const background = article(`${colour(made.primaryBackgroundColor)} background`);
  return `${subject} on ${background}${parts.length ? `, with ${parts.join(', ')}` : ''}`;
}
