//! Counting pieces: all that training keeps of the text.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::Result;
use crate::split::Splitter;
use crate::table::{Key, Table};

/// How often each piece occurs.
pub type Counts = Table<u64>;

/// Counts the pieces of texts that come in batches. Memory grows with the number of different pieces only.
///
/// ```
/// use rustbpe::{count::Counter, split::{DEFAULT_PATTERN, Splitter}};
/// let splitter = Splitter::new(DEFAULT_PATTERN)?;
/// let mut counter = Counter::new(&splitter, 2);
/// counter.add(&["one two", " two"])?;
/// let mut pieces = vec![];
/// counter.finish().for_each(|piece, count| pieces.push((piece.to_vec(), count)));
/// pieces.sort();
/// assert_eq!(pieces, [(b" two".to_vec(), 2), (b"one".to_vec(), 1)]);
/// # Ok::<(), rustbpe::Error>(())
/// ```
pub struct Counter<'a> {
    splitter: &'a Splitter,
    tables: Vec<Counts>, // one a thread
}

impl<'a> Counter<'a> {
    pub fn new(splitter: &'a Splitter, threads: usize) -> Self {
        Counter { splitter, tables: (0..threads.max(1)).map(|_| Counts::default()).collect() }
    }

    /// Count a batch; the threads take texts from it as they become free.
    pub fn add(&mut self, texts: &[&str]) -> Result<()> {
        let next = AtomicUsize::new(0);
        let (splitter, next) = (self.splitter, &next);
        let work = |table: &mut Counts| -> Result<()> {
            while let Some(text) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
                count(splitter, text, table)?;
            }
            Ok(())
        };
        if let [only] = &mut self.tables[..] {
            return work(only);
        }
        std::thread::scope(|scope| {
            let running: Vec<_> = self.tables.iter_mut().map(|table| scope.spawn(move || work(table))).collect();
            running.into_iter().try_for_each(|thread| thread.join().expect("a counting thread panicked"))
        })
    }

    /// The sum of all batches.
    pub fn finish(self) -> Counts {
        self.tables
            .into_iter()
            .reduce(|mut sum, table| {
                table.for_each(|piece, count| *sum.slot(&Key::new(piece, 0, piece.len()), piece) += count);
                sum
            })
            .unwrap_or_default()
    }
}

fn count(splitter: &Splitter, text: &str, table: &mut Counts) -> Result<()> {
    let bytes = text.as_bytes();
    splitter.for_each(text, |start, end| *table.slot(&Key::new(bytes, start, end), &bytes[start..end]) += 1)
}
