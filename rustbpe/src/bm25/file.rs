//! The file of a segment, memory-mapped.
//!
//! | section  | type           | what |
//! |---|---|---|
//! | header   | u64 x 16       | magic, sizes of the sections, rules, checksums |
//! | postings | u32            | block after block, term after term: text in its block << 16 \| frequency, texts rising |
//! | lengths  | u32            | terms in each text |
//! | blocks   | u64 x 2        | first text, first posting |
//! | runs     | u32 x 4        | term after term: postings of one term in one block ([`Run`]) |
//! | firsts   | u32            | of each term its first run; the number of runs |
//! | offsets  | u64            | of each term its first byte; the number of bytes |
//! | bytes    | u8             | the terms in UTF-8, sorted |
//!
//! Little endian (a machine of the other kind does not find the magic). The checksum of everything but the postings is
//! compared when the file is opened. The postings are not read then: a changed one changes scores, nothing worse; the
//! knowledge base's own hashes find it.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use memmap2::Mmap;

use super::BLOCK;
use crate::terms::Rules;
use crate::{Error, Result};

pub const HEADER: usize = 16;
pub const MAGIC: u64 = u64::from_le_bytes(*b"bm25 v01");

/// Sizes of the sections in elements, in the order of the file.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sizes {
    pub postings: u64,
    pub texts: u64,
    pub blocks: u64,
    pub runs: u64,
    pub terms: u64,
    pub bytes: u64,
}

impl Sizes {
    /// First bytes of the sections, then the length of the file. None if that is beyond 64 bits.
    fn starts(&self) -> Option<[u64; 8]> {
        let (terms, header) = (self.terms.checked_add(1)?, HEADER as u64);
        let sizes = [(header, 8), (self.postings, 4), (self.texts, 4), (self.blocks, 16), (self.runs, 16), (terms, 4)];
        let (mut starts, mut at) = ([0; 8], 0u64);
        for (i, (count, width)) in sizes.into_iter().chain([(terms, 8), (self.bytes, 1)]).enumerate() {
            at = at.checked_add(count.checked_mul(width)?)?.checked_next_multiple_of(8)?; // 8: what the casts need
            starts[i] = at;
        }
        Some(starts)
    }

    pub fn header(&self, rules: Rules, length: u64, checksum: u64) -> [u64; HEADER] {
        let rules = rules.stem as u64 | (rules.stop_words as u64) << 1;
        let sizes = [self.postings, self.texts, self.blocks, self.runs, self.terms, self.bytes];
        let mut header = [0; HEADER];
        header[0] = MAGIC;
        header[1..7].copy_from_slice(&sizes);
        header[7..10].copy_from_slice(&[rules, length, checksum]);
        header[HEADER - 1] = mix(0, bytemuck::cast_slice(&header[..HEADER - 1]));
        header
    }
}

/// A checksum continued, as if zeros filled the last 8 bytes: it finds accidents, not attackers.
pub fn mix(sum: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    words.iter().chain((!rest.is_empty()).then_some(&last)).fold(sum, |sum, word| {
        let sum = (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum ^ sum >> 29
    })
}

/// The postings of one term in one block, and what bounds its scores there.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    pub block: u32,      // < 65,536
    pub max_tf: u32,     // < 65,536
    pub min_length: u32, // of the texts with the term
    pub start: u32,      // in the block's postings
    pub len: u32,        // 1 ..= BLOCK
}

impl Run {
    pub fn pack(&self) -> [u32; 4] {
        [self.block << 16 | self.max_tf, self.min_length, self.start, self.len]
    }

    pub fn unpack([first, min_length, start, len]: [u32; 4]) -> Run {
        Run { block: first >> 16, max_tf: first & 0xffff, min_length, start, len }
    }
}

/// A block as a search needs it.
pub struct Block<'a> {
    pub first: usize, // text of the segment
    pub len: usize,   // texts, at most BLOCK
    pub norms: &'a [f32; BLOCK],
    start: u64, // first posting
}

pub struct Segment {
    path: PathBuf,
    map: Mmap,
    starts: [u64; 8],
    norms: Vec<f32>, // of each text, then BLOCK more: the last block has BLOCK norms too
    pub rules: Rules,
    pub texts: usize,
    pub terms: usize,
    pub length: u64, // terms in all texts
}

impl Segment {
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> Result<Segment> {
        let say = |what: &str| Error(format!("{}: {what}", path.display()));
        let file = File::open(path).map_err(|e| say(&format!("cannot be opened ({e})")))?;
        // SAFETY: a segment is written under another name, renamed and never changed. Who changes it all the same while
        // it is open changes numbers that are checked at each use, or ends the process (SIGBUS), as with every mapping.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| say(&format!("cannot be mapped ({e})")))?;
        let header: &[u64] = map.get(..8 * HEADER).map(bytemuck::cast_slice).unwrap_or_default();
        if header.first() != Some(&MAGIC) {
            return Err(say("is not a BM25 index of this version"));
        }
        if header[HEADER - 1] != mix(0, bytemuck::cast_slice(&header[..HEADER - 1])) {
            return Err(say("the header is damaged: build the index again"));
        }
        let [postings, texts, blocks, runs, terms, bytes, rules, length, checksum] =
            header[1..10].try_into().expect("9");
        let starts = Sizes { postings, texts, blocks, runs, terms, bytes }.starts();
        let starts = starts.filter(|starts| starts[7] == map.len() as u64).ok_or_else(|| {
            say(&format!("has {} bytes, not what its header says: it was cut short; build the index again", map.len()))
        })?;
        if mix(0, &map[starts[1] as usize..]) != checksum {
            return Err(say("is damaged (its checksum differs): build the index again"));
        }
        let rules = Rules { stem: rules & 1 != 0, stop_words: rules & 2 != 0 };
        let (texts, terms) = (texts as usize, terms as usize);
        Ok(Segment { path: path.to_owned(), map, starts, norms: Vec::new(), rules, texts, terms, length })
    }

    pub fn name(&self) -> std::path::Display<'_> {
        self.path.display()
    }

    pub fn set_norms(&mut self, norm: impl Fn(u32) -> f32) {
        let norms = self.section::<u32>(1)[..self.texts].iter().map(|&length| norm(length)).collect();
        self.norms = norms;
        self.norms.resize(self.texts + BLOCK, 1.0);
    }

    fn damaged(&self) -> Error {
        Error(format!("{}: is damaged (a number points outside it): build the index again", self.name()))
    }

    /// Everything in a section, padding included.
    fn section<T: Pod>(&self, i: usize) -> &[T] {
        let bytes = &self.map[self.starts[i] as usize..self.starts[i + 1] as usize];
        bytemuck::cast_slice(&bytes[..bytes.len() / size_of::<T>() * size_of::<T>()])
    }

    fn range<T: Pod>(&self, i: usize, range: Range<usize>) -> Result<&[T]> {
        self.section(i).get(range).ok_or_else(|| self.damaged())
    }

    pub fn block(&self, block: usize) -> Result<Block<'_>> {
        let table = self.section::<[u64; 2]>(2);
        let [first, start] = *table.get(block).ok_or_else(|| self.damaged())?;
        let end = table.get(block + 1).map_or(self.texts as u64, |next| next[0]);
        let len = end.checked_sub(first).filter(|&len| len <= BLOCK as u64 && end <= self.texts as u64);
        let len = len.ok_or_else(|| self.damaged())? as usize;
        let norms = self.norms[first as usize..][..BLOCK].try_into().expect("padded");
        Ok(Block { first: first as usize, len, norms, start })
    }

    pub fn postings(&self, block: &Block, run: &Run) -> Result<&[u32]> {
        let start = block.start.saturating_add(run.start as u64) as usize;
        self.range(0, start..start.saturating_add(run.len as usize))
    }

    pub fn runs(&self, runs: Range<usize>) -> Result<&[[u32; 4]]> {
        self.range(3, runs)
    }

    pub fn run_range(&self, term: usize) -> Result<Range<usize>> {
        let firsts = self.range::<u32>(4, term..term + 2)?;
        Ok(firsts[0] as usize..firsts[1] as usize)
    }

    /// Texts with the term.
    pub fn df(&self, term: usize) -> Result<u64> {
        Ok(self.runs(self.run_range(term)?)?.iter().map(|&run| Run::unpack(run).len as u64).sum())
    }

    pub fn term(&self, term: usize) -> Result<&[u8]> {
        let offsets = self.range::<u64>(5, term..term + 2)?;
        self.range(6, offsets[0] as usize..offsets[1] as usize)
    }

    /// The number of a term by binary search.
    pub fn find(&self, term: &[u8]) -> Result<Option<usize>> {
        let (mut low, mut high) = (0, self.terms);
        while low < high {
            let middle = (low + high) / 2;
            match self.term(middle)?.cmp(term) {
                std::cmp::Ordering::Equal => return Ok(Some(middle)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}
