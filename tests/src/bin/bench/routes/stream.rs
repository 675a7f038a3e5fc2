//! Messages at a fixed rate, from a connection and a thread of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use router_tests::lab::Lab;
use router_tests::nats::Publisher;

/// Between two batches.
pub(super) const BATCH_EVERY: Duration = Duration::from_millis(10);

/// While it lives, batches are published in turn, one every [`BATCH_EVERY`].
pub(super) struct Stream {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<usize>>,
}

impl Stream {
    pub(super) fn start(lab: &Lab, batches: Arc<Vec<Vec<u8>>>) -> anyhow::Result<Stream> {
        let mut publisher = Publisher::connect(lab)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            let mut sent = 0;
            for batch in batches.iter().cycle() {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let due = start + BATCH_EVERY * u32::try_from(sent)?;
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
                publisher.send_encoded(batch)?;
                sent += 1;
            }
            publisher.publish_encoded(&[])?;
            Ok(sent)
        });
        Ok(Stream { stop, thread })
    }

    /// How many batches were published.
    ///
    /// # Errors
    /// The server did not take them.
    pub(super) fn stop(self) -> anyhow::Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.map_err(|_| anyhow!("the publisher panicked"))?
    }
}
