//! Parquet's footer and page headers are looked through before the Parquet crate reads them.
//!
//! They are Thrift structs in the compact protocol, and the crate believes them: a list of two thousand million
//! booleans takes six bytes and no end of time, a field of another type than the format's is read as if it had the
//! right one, and a page of ten bytes may ask for two GiB to be unpacked into, or hold as many equal values. What is
//! walked here to its end, with every field of the format in its type, takes the crate time and memory in proportion
//! to its bytes.
//!
//! Source: the Thrift compact protocol's specification, and `parquet.thrift` of the format.

/// Structs within structs that are followed.
const MAX_DEPTH: usize = 64;
/// Bytes that a page may be unpacked into; writers make pages of about 1 MiB.
const MAX_PAGE_BYTES: i32 = 512 << 20;
/// Values of a column chunk: these, and so many for each of its bytes. Runs of one value take next to no bytes.
const FREE_VALUES: u64 = 1 << 22;
const VALUES_PER_BYTE: u64 = 1024;
/// Bytes of a varint of 64 bits.
const MAX_VARINT_BYTES: usize = 10;

/// What a field holds.
#[derive(Clone, Copy)]
enum Kind {
    Bool,
    Byte,
    /// Of 16, 32 or 64 bits, all written as varints.
    Int,
    Double,
    Binary,
    List(&'static Kind),
    /// Ids and kinds of the fields; others are of any kind.
    Struct(&'static [(i16, Kind)]),
}

use Kind::{Binary, Bool, Byte, Double, Int, List, Struct};

const EMPTY: Kind = Struct(&[]);
const TIME: Kind = Struct(&[(1, Bool), (2, Struct(&[(1, EMPTY), (2, EMPTY), (3, EMPTY)]))]);
const LOGICAL_TYPE: Kind = Struct(&[
    (1, EMPTY),
    (2, EMPTY),
    (3, EMPTY),
    (4, EMPTY),
    (5, Struct(&[(1, Int), (2, Int)])),
    (6, EMPTY),
    (7, TIME),
    (8, TIME),
    (10, Struct(&[(1, Byte), (2, Bool)])),
    (11, EMPTY),
    (12, EMPTY),
    (13, EMPTY),
    (14, EMPTY),
    (15, EMPTY),
    (16, Struct(&[(1, Byte)])),
    (17, Struct(&[(1, Binary)])),
    (18, Struct(&[(1, Binary), (2, Int)])),
]);
const SCHEMA_ELEMENT: Kind = Struct(&[
    (1, Int),
    (2, Int),
    (3, Int),
    (4, Binary),
    (5, Int),
    (6, Int),
    (7, Int),
    (8, Int),
    (9, Int),
    (10, LOGICAL_TYPE),
]);
const KEY_VALUE: Kind = Struct(&[(1, Binary), (2, Binary)]);
const STATISTICS: Kind = Struct(&[
    (1, Binary),
    (2, Binary),
    (3, Int),
    (4, Int),
    (5, Binary),
    (6, Binary),
    (7, Bool),
    (8, Bool),
    (9, Int),
]);
const BOUNDING_BOX: Kind = Struct(&[
    (1, Double),
    (2, Double),
    (3, Double),
    (4, Double),
    (5, Double),
    (6, Double),
    (7, Double),
    (8, Double),
]);
const COLUMN_META_DATA: Kind = Struct(&[
    (1, Int),
    (2, List(&Int)),
    (3, List(&Binary)),
    (4, Int),
    (5, Int),
    (6, Int),
    (7, Int),
    (8, List(&KEY_VALUE)),
    (9, Int),
    (10, Int),
    (11, Int),
    (12, STATISTICS),
    (13, List(&Struct(&[(1, Int), (2, Int), (3, Int)]))),
    (14, Int),
    (15, Int),
    (16, Struct(&[(1, Int), (2, List(&Int)), (3, List(&Int))])),
    (17, Struct(&[(1, BOUNDING_BOX), (2, List(&Int))])),
]);
const COLUMN_CHUNK: Kind = Struct(&[
    (1, Binary),
    (2, Int),
    (3, COLUMN_META_DATA),
    (4, Int),
    (5, Int),
    (6, Int),
    (7, Int),
    (8, Struct(&[(1, EMPTY), (2, Struct(&[(1, List(&Binary)), (2, Binary)]))])),
    (9, Binary),
]);
const ROW_GROUP: Kind = Struct(&[
    (1, List(&COLUMN_CHUNK)),
    (2, Int),
    (3, Int),
    (4, List(&Struct(&[(1, Int), (2, Bool), (3, Bool)]))),
    (5, Int),
    (6, Int),
    (7, Int),
]);
const FILE_META_DATA: Kind = Struct(&[
    (1, Int),
    (2, List(&SCHEMA_ELEMENT)),
    (3, Int),
    (4, List(&ROW_GROUP)),
    (5, List(&KEY_VALUE)),
    (6, Binary),
    (7, List(&Struct(&[(1, EMPTY), (2, EMPTY)]))),
    (8, Struct(&[])),
    (9, Binary),
]);
const PAGE_HEADER: Kind = Struct(&[
    (1, Int),
    (UNPACKED, Int),
    (PACKED, Int),
    (4, Int),
    (5, Struct(&[(1, Int), (2, Int), (3, Int), (4, Int), (5, STATISTICS)])),
    (6, EMPTY),
    (7, Struct(&[(1, Int), (2, Int), (3, Bool)])),
    (
        8,
        Struct(&[
            (1, Int),
            (2, Int),
            (3, Int),
            (4, Int),
            (5, Int),
            (6, Int),
            (7, Bool),
            (8, STATISTICS),
        ]),
    ),
]);
/// Id of a page's bytes once unpacked.
const UNPACKED: i16 = 2;
/// Id of a page's bytes in the file.
const PACKED: i16 = 3;

/// Looks through the footer of a file's bytes; that of a file without one is the crate's to refuse.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_footer(file: &[u8]) -> Result<(), String> {
    let Some((rest, tail)) = file.split_last_chunk::<8>() else { return Ok(()) };
    let bytes = u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]) as usize;
    match rest.len().checked_sub(bytes) {
        Some(at) if &tail[4..] == b"PAR1" => Walk::new(&rest[at..]).value(&FILE_META_DATA),
        _ => Ok(()),
    }
}

/// Looks through the page headers of a column chunk, which takes `bytes` from `start` on.
///
/// # Errors
/// What is wrong with them.
pub(super) fn check_pages(file: &[u8], start: u64, bytes: u64) -> Result<(), String> {
    let chunk = usize::try_from(start).ok().and_then(|start| file.get(start..));
    let mut rest = chunk.ok_or("a column that begins behind the file's end")?;
    let (mut left, mut values) = (bytes, 0u64);
    while left > 0 {
        let mut walk = Walk::new(rest);
        walk.value(&PAGE_HEADER)?;
        values += walk.values as u64;
        if values > FREE_VALUES.saturating_add(VALUES_PER_BYTE.saturating_mul(bytes)) {
            return Err(format!("{values} values in {bytes} bytes"));
        }
        // Sizes have 32 bits, whatever their varints say.
        let [unpacked, packed] = [UNPACKED, PACKED].map(|id| walk.top[id as usize] as i32);
        if !(0..=MAX_PAGE_BYTES).contains(&unpacked) {
            return Err(format!("a page of {unpacked} bytes"));
        }
        let page = usize::try_from(packed).map_err(|_| format!("a page of {packed} bytes"))?;
        let end = walk.at + page;
        rest = rest.get(end..).ok_or("a page that goes on behind the file's end")?;
        left = left.checked_sub(end as u64).ok_or("a page that is larger than its column")?;
    }
    Ok(())
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
    /// Integer fields of the outermost struct by id; -1 where there is none.
    top: [i64; 4],
    /// The largest first field of the structs in the outermost one: of a page header the page's values.
    values: u32,
}

impl Walk<'_> {
    fn new(bytes: &[u8]) -> Walk<'_> {
        Walk { bytes, at: 0, depth: 0, top: [-1; 4], values: 0 }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn skip(&mut self, n: u64) -> Result<(), String> {
        if n > self.left() as u64 {
            return Err("a header that is cut".into());
        }
        self.at += n as usize;
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.skip(1)?;
        Ok(self.bytes[self.at - 1])
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for i in 0..MAX_VARINT_BYTES {
            let byte = self.byte()?;
            value |= ((byte & 0x7f) as u64).wrapping_shl(7 * i as u32);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a number of more than 64 bits".into())
    }

    fn int(&mut self) -> Result<i64, String> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A value of a kind that is known.
    fn value(&mut self, kind: &Kind) -> Result<(), String> {
        match kind {
            Bool => Err("a list of booleans".into()), // else the field's type is the value
            Byte => self.skip(1),
            Int => self.varint().map(drop),
            Double => self.skip(8),
            Binary => {
                let bytes = self.varint()?;
                self.skip(bytes)
            }
            List(element) => self.list(Some(element)),
            Struct(fields) => self.fields(fields),
        }
    }

    /// A value of this type in the protocol's numbering.
    fn any(&mut self, ty: u8) -> Result<(), String> {
        match ty {
            1 | 2 => Err("a list of booleans".into()),
            3 => self.value(&Byte),
            4..=6 => self.value(&Int),
            7 => self.value(&Double),
            8 => self.value(&Binary),
            9 | 10 => self.list(None),
            11 => self.map(),
            12 => self.fields(&[]),
            13 => self.skip(16), // a UUID
            _ => Err(format!("a field of type {ty}")),
        }
    }

    fn fields(&mut self, known: &[(i16, Kind)]) -> Result<(), String> {
        self.deeper(|walk| {
            let mut id = 0i16;
            loop {
                let head = walk.byte()?;
                let (step, ty) = ((head >> 4) as i16, head & 15);
                if ty == 0 {
                    return Ok(());
                }
                id = match step {
                    0 => walk.int()? as i16,
                    step => id.checked_add(step).ok_or("a field id of more than 16 bits")?,
                };
                let kind = known.iter().find(|(known, _)| *known == id).map(|(_, kind)| kind);
                if kind.is_some_and(|kind| !kind.is(ty)) {
                    return Err(format!("field {id} of another type than the format's"));
                }
                match kind {
                    _ if ty <= 2 => {}
                    Some(Int) => {
                        let value = walk.int()?;
                        match (walk.depth, id) {
                            (1, 0..4) => walk.top[id as usize] = value,
                            (2, 1) => walk.values = walk.values.max(value as u32),
                            _ => {}
                        }
                    }
                    Some(kind) => walk.value(kind)?,
                    None => walk.any(ty)?,
                }
            }
        })
    }

    fn list(&mut self, element: Option<&Kind>) -> Result<(), String> {
        self.deeper(|walk| {
            let head = walk.byte()?;
            let (few, ty) = ((head >> 4) as u64, head & 15);
            let n = if few == 15 { walk.varint()? } else { few };
            walk.count(n)?;
            if n > 0 && element.is_some_and(|kind| !kind.is(ty)) {
                return Err("a list of another type than the format's".into());
            }
            (0..n).try_for_each(|_| match element {
                Some(kind) => walk.value(kind),
                None => walk.any(ty),
            })
        })
    }

    fn map(&mut self) -> Result<(), String> {
        self.deeper(|walk| {
            let n = walk.varint()?;
            walk.count(n)?;
            if n == 0 {
                return Ok(());
            }
            let types = walk.byte()?;
            (0..n).try_for_each(|_| walk.any(types >> 4).and_then(|()| walk.any(types & 15)))
        })
    }

    /// Every element takes a byte or more.
    fn count(&self, n: u64) -> Result<(), String> {
        if n > self.left() as u64 {
            return Err(format!("a list of {n} elements in {} bytes", self.left()));
        }
        Ok(())
    }

    fn deeper(&mut self, walk: impl FnOnce(&mut Self) -> Result<(), String>) -> Result<(), String> {
        if self.depth == MAX_DEPTH {
            return Err(format!("more than {MAX_DEPTH} levels"));
        }
        self.depth += 1;
        let walked = walk(self);
        self.depth -= 1;
        walked
    }
}

impl Kind {
    /// Whether a field of this kind has that type in the protocol's numbering.
    fn is(&self, ty: u8) -> bool {
        match self {
            Bool => ty == 1 || ty == 2,
            Byte => ty == 3,
            Int => (4..=6).contains(&ty),
            Double => ty == 7,
            Binary => ty == 8,
            List(_) => ty == 9,
            Struct(_) => ty == 12,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(bytes: &[u8]) -> Result<(), String> {
        let mut file = bytes.to_vec();
        file.extend((bytes.len() as u32).to_le_bytes());
        file.extend(b"PAR1");
        check_footer(&file)
    }

    #[test]
    fn what_costs_nothing_to_write_and_much_to_read_is_refused() {
        let many = [0xff, 0xff, 0xff, 0xff, 0x07];
        for (what, bytes) in [
            ("a list of booleans", [&[0x09, 0xc8, 0x01, 0xf1], &many[..]].concat()),
            ("a list of UUIDs behind the end", [&[0x09, 0xc8, 0x01, 0xfd], &many[..]].concat()),
            ("a map of booleans", [&[0x0b, 0xc8, 0x01, 0x01, 0x11], &[0u8][..]].concat()),
            ("created_by as a list of booleans", [&[0x69, 0xf1], &many[..]].concat()),
            ("structs without end", [0x1c].repeat(100)),
            ("nothing", vec![]),
        ] {
            assert!(footer(&bytes).is_err(), "{what}");
        }
        // version 1, and a list of no elements for an id that nobody knows
        assert_eq!(footer(&[0x15, 0x02, 0x09, 0xc8, 0x01, 0x01, 0x00]), Ok(()));
    }

    #[test]
    fn pages_stay_within_file_and_column() {
        // type 0, 4 bytes unpacked, 3 in the file
        let page = [0x15, 0x00, 0x15, 0x08, 0x15, 0x06, 0x00, b'a', b'b', b'c'];
        let two = page.repeat(2);
        assert_eq!(check_pages(&two, 0, 20), Ok(()));
        assert_eq!(check_pages(&two, 10, 10), Ok(()));
        assert_eq!(check_pages(&two, 20, 0), Ok(()));
        for (start, bytes) in [(0, 15), (0, 21), (10, 20), (5, 10), (21, 0), (u64::MAX, 1)] {
            assert!(check_pages(&two, start, bytes).is_err(), "{start}, {bytes}");
        }
        // a dictionary of 2^30 values: their number is the header's
        let many = [
            0x15, 0x00, 0x15, 0x08, 0x15, 0x06, 0x4c, 0x15, 0x80, 0x80, 0x80, 0x80, 0x08, 0x00,
            0x00,
        ];
        let many = [&many[..], b"abc"].concat();
        assert!(check_pages(&many, 0, 18).unwrap_err().contains("1073741824 values"));
        // 2^30 bytes unpacked
        let bomb = [0x15, 0x00, 0x15, 0x80, 0x80, 0x80, 0x80, 0x08, 0x15, 0x00, 0x00];
        assert!(check_pages(&bomb, 0, 11).unwrap_err().contains("1073741824"));
    }
}
