//! The programs' settings, and how long a tick is.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use aya::Ebpf;
use aya::maps::{Array, MapData};
use router_common::{ClockSample, FlowState, LAYOUT, MAX_TICKS, Settings};

use super::{Options, array, maps, programs, run};
use crate::config::FlowTimeouts;

/// How long later fragments may come after the first; IPv4 hosts wait as long for all of a datagram
/// (Linux: net.ipv4.ipfrag_time).
const FRAGMENT_TIMEOUT: Duration = Duration::from_secs(30);
/// Jiffies over which their length is measured: 40 ms at the usual 250 a second.
const JIFFIES_COUNTED: u64 = 10;

/// Writes the one value of `SETTINGS`; hash keys and the unit of time stay those of adopted maps.
pub(super) fn write(ebpf: &mut Ebpf, options: &Options) -> anyhow::Result<(Settings, Clock)> {
    let (hz, sample, at) = jiffies_per_second(ebpf)?;
    let map = ebpf.map_mut("SETTINGS").context("no map SETTINGS")?;
    let mut map: Array<&mut MapData, Settings> = Array::try_from(map).context("map SETTINGS")?;
    let before = map.get(&0, 0).context("read SETTINGS")?;
    let fresh = before.layout == 0;
    let clock = Clock {
        jiffies: sample.jiffies,
        monotonic_ns: sample.monotonic_ns,
        at,
        hz,
        // Times in an adopted flow table stay in the unit they were taken in.
        tick_shift: if fresh {
            tick_shift(hz)
        } else {
            before.tick_shift
        },
    };
    let settings = Settings {
        // An adopted flow table stays where its keys put it.
        hash_keys: if fresh {
            rand::random()
        } else {
            before.hash_keys
        },
        bucket_mask: maps::buckets(&options.limits) - 1,
        vip_mask: maps::vip_heads(&options.limits) - 1,
        tick_shift: clock.tick_shift,
        timeouts: timeouts(&options.timeouts, &clock),
        nat_port_first: options.nat_ports.first,
        nat_port_count: options.nat_ports.last - options.nat_ports.first + 1,
        sample: 0,
        dnat: before.dnat,
        gue_port: options.gue_port,
        reserved: 0,
        layout: LAYOUT,
    };
    map.set(0, settings, 0).context("write SETTINGS")?;
    Ok((settings, clock))
}

/// CLOCK_MONOTONIC as the programs read it.
#[derive(Clone, Copy, Debug)]
pub struct MonotonicClock {
    nanoseconds: u64,
    /// When it read that.
    at: Instant,
}

impl MonotonicClock {
    pub fn instant_of(&self, nanoseconds: u64) -> Instant {
        match nanoseconds.checked_sub(self.nanoseconds) {
            Some(after) => self.at + Duration::from_nanos(after),
            None => self.at,
        }
    }
}

/// The programs' clock: jiffies, of which 2^`tick_shift` are a tick.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// At the moment `at`. They go on as CLOCK_MONOTONIC does, which [`Instant`] reads.
    jiffies: u64,
    monotonic_ns: u64,
    at: Instant,
    hz: u32,
    tick_shift: u32,
}

impl Clock {
    pub(super) fn ticks_per_second(&self) -> f64 {
        f64::from(self.hz) / f64::from(1u32 << self.tick_shift)
    }

    pub(super) fn monotonic(&self) -> MonotonicClock {
        MonotonicClock {
            nanoseconds: self.monotonic_ns,
            at: self.at,
        }
    }

    /// Modulo 2^16, as in a flow's slot.
    pub(super) fn ticks_at(&self, now: Instant) -> u32 {
        let passed = now.saturating_duration_since(self.at).as_nanos() * u128::from(self.hz);
        let jiffies = self.jiffies + (passed / 1_000_000_000) as u64;
        (jiffies >> self.tick_shift) as u32 & 0xffff
    }

    pub(super) fn duration_of(&self, ticks: u32) -> Duration {
        Duration::from_secs_f64(f64::from(ticks) / self.ticks_per_second())
    }

    /// At least one, at most [`MAX_TICKS`].
    fn ticks_in(&self, duration: Duration) -> u32 {
        let ticks = duration.as_secs_f64() * self.ticks_per_second();
        // `as` saturates.
        (ticks as u32).clamp(1, MAX_TICKS)
    }
}

/// Half a second to a second: fine enough for timeouts, coarse enough to write rarely.
fn tick_shift(hz: u32) -> u32 {
    (hz / 2).max(1).next_power_of_two().ilog2()
}

fn timeouts(configured: &FlowTimeouts, clock: &Clock) -> [u32; FlowState::COUNT] {
    let mut timeouts = [0; FlowState::COUNT];
    for (state, timeout) in [
        (FlowState::Syn, configured.tcp_syn),
        (FlowState::Established, configured.tcp_established),
        (FlowState::FinClient, configured.tcp_established),
        (FlowState::FinBackend, configured.tcp_established),
        (FlowState::Closing, configured.tcp_closing),
        (FlowState::Udp, configured.udp),
        (FlowState::Fragment, FRAGMENT_TIMEOUT),
    ] {
        timeouts[state as usize] = clock.ticks_in(timeout);
    }
    // The VIP says how long.
    timeouts[FlowState::Affinity as usize] = u32::MAX;
    timeouts
}

/// CONFIG_HZ, which the kernel tells nobody: from its two clocks, some milliseconds apart. With the
/// last sample and when it was taken.
fn jiffies_per_second(ebpf: &mut Ebpf) -> anyhow::Result<(u32, ClockSample, Instant)> {
    let clock: Array<MapData, ClockSample> = array(ebpf, "CLOCK")?;
    let mut sample = || -> anyhow::Result<ClockSample> {
        run::test_run(
            programs::xdp(ebpf, programs::CLOCK)?,
            &run::EMPTY_FRAME,
            None,
            None,
        )?;
        clock.get(&0, 0).context("read CLOCK")
    };
    // From one edge of a jiffy to another, or the count would be off by one.
    let mut edge = |after: u64| -> anyhow::Result<ClockSample> {
        loop {
            let now = sample()?;
            if now.jiffies > after {
                return Ok(now);
            }
            std::thread::yield_now();
        }
    };
    let before = edge(0)?;
    let first = edge(before.jiffies)?;
    let last = edge(first.jiffies + JIFFIES_COUNTED - 1)?;
    let at = Instant::now();
    ensure!(
        last.monotonic_ns > first.monotonic_ns,
        "the clock stands still"
    );
    let per_second = (last.jiffies - first.jiffies) as f64 * 1e9
        / (last.monotonic_ns - first.monotonic_ns) as f64;
    // Kernel: kernel/Kconfig.hz.
    let nearest = [100u32, 250, 300, 1000]
        .into_iter()
        .min_by_key(|hz| (f64::from(*hz) - per_second).abs() as u32)
        .expect("four frequencies");
    Ok((nearest, last, at))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(hz: u32) -> Clock {
        Clock {
            jiffies: 1 << 33,
            monotonic_ns: 0,
            at: Instant::now(),
            hz,
            tick_shift: tick_shift(hz),
        }
    }

    #[test]
    fn a_tick_is_half_a_second_to_a_second() {
        for hz in [100, 250, 300, 1000] {
            let per_second = clock(hz).ticks_per_second();
            assert!((1.0..=2.0).contains(&per_second), "{hz}: {per_second}");
        }
    }

    #[test]
    fn timeouts_fit_what_ticks_can_tell() {
        let hour = Duration::from_secs(3600);
        let configured = FlowTimeouts {
            tcp_established: 100 * hour,
            udp: Duration::from_millis(1),
            ..FlowTimeouts::default()
        };
        let ticks = timeouts(&configured, &clock(250));
        assert_eq!(ticks[FlowState::Established as usize], MAX_TICKS);
        assert_eq!(ticks[FlowState::Udp as usize], 1);
        assert_eq!(ticks[FlowState::Fragment as usize], 58);
        assert_eq!(ticks[FlowState::Affinity as usize], u32::MAX);
    }

    #[test]
    fn ticks_go_on_with_the_clock() {
        let clock = clock(1000);
        let at = |seconds| clock.ticks_at(clock.at + Duration::from_secs(seconds));
        assert_eq!(at(0), (1u64 << 33 >> 9) as u32 & 0xffff);
        assert_eq!(at(512) - at(0), 1000);
        assert_eq!(clock.duration_of(1000), Duration::from_secs(512));
    }
}
