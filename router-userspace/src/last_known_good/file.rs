//! The file as a whole: header, records, trailer.
//!
//! | part | content |
//! |---|---|
//! | header | 8 bytes `VIADUCT` and a version |
//! | declaration | 1, the match, the policy |
//! | HTTP pool, VIP pool | 2 or 3, the match or VIP, balance, route service, backends |
//! | trailer | 0, the time in seconds since the Unix epoch, then length and CRC-32 of all before, little endian |
//!
//! A backend is written where it is first named, and named by its number from there on.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::bytes::{Decoder, Encoder};
use super::events::{self, Events};
use super::{FILE, Kept, MAX_FILE_BYTES, NEW_FILE, policy, words};
use crate::route::{Backend, Origin, Pool};
use crate::snapshot::Snapshot;

/// The last byte is the version of all that follows.
const HEADER: &[u8; 8] = b"VIADUCT\x01";
/// Length and checksum.
const SEAL_BYTES: usize = 8 + 4;
const BUFFER_BYTES: usize = 256 << 10;

pub const END: u8 = 0;
pub const DECLARATION: u8 = 1;
pub const HTTP_POOL: u8 = 2;
pub const VIP_POOL: u8 = 3;

/// Why there is nothing from a file.
#[derive(Debug)]
pub enum Unread {
    Missing,
    Unreadable(io::Error),
    Corrupt(String),
}

/// Writes a snapshot under another name, and puts it in the place of the last once it is on the disk.
/// `adopted_as_of` is the time of what an earlier gateway knew, for as long as some of it is served.
/// Returns how many bytes it has.
pub fn write(
    directory: &Path,
    snapshot: &Snapshot,
    adopted_as_of: Option<SystemTime>,
) -> io::Result<u64> {
    let new = directory.join(NEW_FILE);
    let file = File::create(&new)?;
    let out = BufWriter::with_capacity(BUFFER_BYTES, &file);
    let written = encode(out, snapshot, adopted_as_of)?;
    file.sync_all()?;
    fs::rename(&new, directory.join(FILE))?;
    File::open(directory)?.sync_all()?;
    Ok(written)
}

/// Reads all of a file, or nothing of it.
pub fn read(path: &Path) -> Result<Kept, Unread> {
    let unreadable = |error: io::Error| match error.kind() {
        ErrorKind::NotFound => Unread::Missing,
        _ => Unread::Unreadable(error),
    };
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > MAX_FILE_BYTES {
        return Err(Unread::Corrupt(format!("{length} bytes long")));
    }
    let content = fs::read(path).map_err(unreadable)?;
    decode(content).map_err(Unread::Corrupt)
}

pub fn encode(
    out: impl Write,
    snapshot: &Snapshot,
    adopted_as_of: Option<SystemTime>,
) -> io::Result<u64> {
    let mut out = Encoder::new(out);
    let mut known = Known::default();
    out.raw(HEADER)?;
    for (route, said) in &snapshot.declared {
        let Some(holds) = said.first() else { continue };
        known.adopted |= holds.origin == Origin::Adopted;
        out.byte(DECLARATION)?;
        words::put_http(
            &mut out,
            &route.host,
            &route.path,
            route.conditions.as_deref(),
        )?;
        policy::put(&mut out, holds)?;
    }
    for (host, routes) in snapshot.hosts.iter() {
        for route in routes.iter() {
            out.byte(HTTP_POOL)?;
            let conditions = route.conditions.map(|conditions| &**conditions);
            words::put_http(&mut out, host, route.path, conditions)?;
            put_pool(&mut out, route.pool, &mut known)?;
        }
    }
    for (vip, pool) in &snapshot.vips {
        out.byte(VIP_POOL)?;
        words::put_vip(&mut out, vip)?;
        put_pool(&mut out, pool, &mut known)?;
    }
    out.byte(END)?;
    let now = SystemTime::now();
    let as_of = adopted_as_of.filter(|_| known.adopted).unwrap_or(now);
    let since_epoch = as_of.duration_since(UNIX_EPOCH).unwrap_or_default();
    out.number(since_epoch.as_secs())?;
    let length = out.length();
    out.raw(&length.to_le_bytes())?;
    let bytes = out.length() + 4;
    let (checksum, mut out) = out.finish();
    out.write_all(&checksum.to_le_bytes())?;
    out.flush()?;
    Ok(bytes)
}

/// What was written so far.
#[derive(Default)]
struct Known {
    /// Numbers of the backends that several routes may share, by address in memory: the snapshot
    /// holds them.
    backends: HashMap<*const Backend, u64>,
    /// Some of it was adopted and not repeated since.
    adopted: bool,
}

fn put_pool<W: Write>(out: &mut Encoder<W>, pool: &Pool, known: &mut Known) -> io::Result<()> {
    let registered = pool.registered.as_deref();
    let balance = registered.and_then(|said| said.balance.as_ref());
    out.option(balance, words::put_balance)?;
    out.text_option(registered.and_then(|said| said.route_service_url.as_ref()))?;
    out.list(&pool.backends, |out, backend| {
        known.adopted |= backend.origin == Origin::Adopted;
        let next = known.backends.len() as u64;
        let number = *known.backends.entry(Arc::as_ptr(backend)).or_insert(next);
        out.number(number)?;
        match number == next {
            true => words::put_backend(out, backend),
            false => Ok(()),
        }
    })
}

/// # Errors
/// What is wrong with it.
pub fn decode(content: Vec<u8>) -> Result<Kept, String> {
    let (start, rest) = content
        .split_at_checked(HEADER.len())
        .ok_or("shorter than its header")?;
    if start[..7] != HEADER[..7] {
        return Err("not a file of this gateway".to_owned());
    }
    if start != HEADER {
        return Err(format!("version {}, not {}", start[7], HEADER[7]));
    }
    let records = rest.len().checked_sub(SEAL_BYTES).ok_or("cut short")?;
    let (records, seal) = rest.split_at(records);
    let (length, checksum) = seal.split_at(8);
    let sealed = content.len() - SEAL_BYTES;
    if length != (sealed as u64).to_le_bytes() {
        return Err("cut short, or longer than it was written".to_owned());
    }
    if checksum != crc32fast::hash(&content[..sealed + 8]).to_le_bytes() {
        return Err("the checksum is another".to_owned());
    }
    let mut input = Decoder(records);
    let as_of = events::check(&mut input).and_then(|()| input.number());
    let as_of = as_of
        .filter(|_| input.0.is_empty())
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .ok_or_else(|| format!("malformed {} bytes before the end", input.0.len()))?;
    Ok(Kept {
        events: Events::new(content, HEADER.len()),
        as_of,
    })
}
