//! `viaduct watch`: packets as the gateway decides about them, a sample of them or all.

use std::num::{NonZeroU32, NonZeroU64};

use serde_json::Value;

use crate::cli::client::{self, AdminOption};
use crate::cli::table::cell;
use crate::cli::{Failure, block_on, print_on};
use crate::route::Vip;

#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Show one packet in so many, chosen at random
    #[arg(long, value_name = "PACKETS", default_value = "1")]
    sample: NonZeroU32,
    /// Only packets of this VIP, tcp/ADDRESS:PORT
    #[arg(long)]
    vip: Option<Vip>,
    /// End after so many
    #[arg(long, value_name = "COUNT")]
    count: Option<NonZeroU64>,
    /// Print JSON, one object a packet
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    admin: AdminOption,
}

pub fn run(options: &Options) -> Result<(), Failure> {
    let admin = options.admin.address()?;
    let mut path = format!("/v1/watch?sample={}", options.sample);
    if let Some(vip) = options.vip {
        path.push_str(&format!("&vip={}", client::escape(&vip.to_string())));
    }
    let mut left = options.count.map(NonZeroU64::get);
    let show = |text: &str| {
        let line = match options.json {
            true => text.to_owned(),
            false => line(&serde_json::from_str(text)?),
        };
        if let Some(left) = &mut left {
            *left -= 1;
        }
        Ok(print_on(&format!("{line}\n"))? && left != Some(0))
    };
    Ok(block_on(client::lines(&admin, &path, show))?)
}

/// `12:00:01.123456 new_flow tcp CLIENT -> DIALED via BACKEND, 60 bytes`, and `<-` for answers.
fn line(event: &Value) -> String {
    if let Some(lost) = event["lost"].as_u64() {
        return format!("... {lost} packets not shown: this watcher is too slow, see --sample");
    }
    let time = clock(event["time"].as_f64().unwrap_or_default());
    let field = |name: &str| cell(&event[name]);
    let (arrow, there) = match &event["dialed"] {
        Value::Null => ("<-", field("vip")),
        dialed => ("->", cell(dialed)),
    };
    let via = match &event["backend"] {
        Value::Null => String::new(),
        backend => format!(" via {}", cell(backend)),
    };
    format!(
        "{time} {} {} {} {arrow} {there}{via}, {} bytes",
        field("verdict"),
        field("proto"),
        field("client"),
        field("bytes")
    )
}

/// Time of day, UTC.
fn clock(seconds: f64) -> String {
    const DAY: f64 = 86_400.0;
    let of_day = seconds.rem_euclid(DAY);
    let whole = of_day as u32;
    let (hours, minutes) = (whole / 3600, whole / 60 % 60);
    format!(
        "{hours:02}:{minutes:02}:{:09.6}",
        of_day - f64::from(whole - whole % 60)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_packet_is_a_line() {
        let there = json!({
            "time": 86_400.0 + 3661.5, "verdict": "new_flow", "proto": "tcp",
            "client": "198.51.100.7:40000", "dialed": "192.0.2.10:80", "vip": "tcp/192.0.2.10:80",
            "backend": "10.0.0.11:80", "bytes": 60
        });
        assert_eq!(
            line(&there),
            "01:01:01.500000 new_flow tcp 198.51.100.7:40000 -> 192.0.2.10:80 via 10.0.0.11:80, \
             60 bytes"
        );
        let back = json!({
            "time": 0.0, "verdict": "replied", "proto": "udp", "client": "198.51.100.7:40000",
            "dialed": null, "vip": "udp/192.0.2.10:53", "backend": null, "bytes": 90
        });
        assert_eq!(
            line(&back),
            "00:00:00.000000 replied udp 198.51.100.7:40000 <- udp/192.0.2.10:53, 90 bytes"
        );
        assert!(line(&json!({ "lost": 7 })).contains("7 packets not shown"));
    }
}
