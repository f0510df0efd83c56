//! Changes to valid files.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Numbers that counts, offsets and sizes go wrong with.
pub const ODD: [u64; 14] = [
    0,
    1,
    7,
    31,
    255,
    256,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// One to three changes within the first `reach` bytes.
pub fn mutate(seed: &[u8], reach: usize, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.random_range(1..=3) {
        let reach = reach.min(bytes.len());
        if reach < 9 {
            break;
        }
        let at = rng.random_range(0..reach - 8);
        match rng.random_range(0..8) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes[at..at + 4]
                .copy_from_slice(&(ODD[rng.random_range(0..14)] as u32).to_le_bytes()),
            3 => bytes[at..at + 8].copy_from_slice(&ODD[rng.random_range(0..14)].to_le_bytes()),
            4 => bytes.truncate(rng.random_range(0..bytes.len())),
            5 => drop(bytes.drain(at..(at + rng.random_range(1..64)).min(reach))),
            6 => {
                let piece = bytes[at..(at + rng.random_range(1..64)).min(reach)].to_vec();
                let to = rng.random_range(0..reach);
                bytes.splice(to..to, piece);
            }
            _ => {
                let nan = [f32::NAN, f32::INFINITY, -1.0, 0.0][rng.random_range(0..4)];
                bytes[at..at + 4].copy_from_slice(&nan.to_le_bytes());
            }
        }
    }
    bytes
}

/// One or two changes that a text survives more often: another digit or number, a line or word twice or gone,
/// another character.
pub fn mutate_text(seed: &str, rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut text = seed.to_owned();
    for _ in 0..rng.random_range(1..=2) {
        let numbers: Vec<_> =
            text.match_indices(|c: char| c.is_ascii_digit()).map(|m| m.0).collect();
        let places: Vec<usize> = text.char_indices().map(|c| c.0).collect();
        if places.is_empty() {
            break;
        }
        let at = places[rng.random_range(0..places.len())];
        match rng.random_range(0..6) {
            0 if !numbers.is_empty() => {
                let at = numbers[rng.random_range(0..numbers.len())];
                text.replace_range(at..at + 1, &rng.random_range(0..10).to_string());
            }
            1 if !numbers.is_empty() => {
                let at = numbers[rng.random_range(0..numbers.len())];
                let end =
                    text[at..].find(|c: char| !c.is_ascii_digit()).map_or(text.len(), |n| at + n);
                text.replace_range(at..end, &ODD[rng.random_range(0..ODD.len())].to_string());
            }
            2 => {
                let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
                let line = rng.random_range(0..lines.len());
                match rng.random() {
                    true => drop(lines.remove(line)),
                    false => lines.insert(rng.random_range(0..=lines.len()), lines[line]),
                }
                text = lines.concat();
            }
            3 => {
                let odd =
                    ["\u{1f600}", "\"", "{", "}", "\\", "[", "-", "", " ", "\0", "\u{301}", "e9"];
                text.insert_str(at, odd[rng.random_range(0..odd.len())]);
            }
            4 => drop(text.remove(at)),
            _ => {
                let letter = rng.random_range(b' '..=b'~') as char;
                text.remove(at);
                text.insert(at, letter);
            }
        }
    }
    text.into_bytes()
}
