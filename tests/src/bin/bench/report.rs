//! Figures collected by round, printed as a table for people or a line each for programs.

use std::fmt::Write;

use serde::Serialize;

/// The figures of one benchmark, in the order of their first sample.
pub(crate) struct Report {
    bench: &'static str,
    /// Whose best figure viaduct's are compared with.
    peers: &'static [&'static str],
    figures: Vec<Figure>,
}

/// What is printed of a figure, in this order.
#[derive(Serialize)]
struct Line<'a> {
    bench: &'a str,
    row: &'a str,
    who: &'a str,
    metric: &'a str,
    median: f64,
    min: f64,
    max: f64,
    rounds: usize,
}

struct Figure {
    row: String,
    who: &'static str,
    metric: &'static str,
    /// One sample a round.
    samples: Vec<f64>,
}

impl Report {
    pub(crate) fn new(bench: &'static str) -> Report {
        Report::beside(bench, &[])
    }

    /// With viaduct's figures relative to the best of these.
    pub(crate) fn beside(bench: &'static str, peers: &'static [&'static str]) -> Report {
        Report {
            bench,
            peers,
            figures: Vec::new(),
        }
    }

    /// Adds one round's sample; the metric's name ends in its unit.
    pub(crate) fn add(&mut self, row: &str, who: &'static str, metric: &'static str, sample: f64) {
        let same = |f: &&mut Figure| f.row == row && f.who == who && f.metric == metric;
        match self.figures.iter_mut().find(same) {
            Some(figure) => figure.samples.push(sample),
            None => self.figures.push(Figure {
                row: row.to_owned(),
                who,
                metric,
                samples: vec![sample],
            }),
        }
    }

    /// One object a line.
    pub(crate) fn json(&self) -> String {
        let mut text = String::new();
        for figure in &self.figures {
            let sorted = figure.sorted();
            let line = Line {
                bench: self.bench,
                row: &figure.row,
                who: figure.who,
                metric: figure.metric,
                median: round(median(&sorted)),
                min: round(sorted[0]),
                max: round(sorted[sorted.len() - 1]),
                rounds: sorted.len(),
            };
            text += &serde_json::to_string(&line).expect("names and numbers are JSON");
            text.push('\n');
        }
        text
    }

    /// Viaduct's figure relative to the best peer's of the same row and metric, and who that is.
    fn best_peer(&self, ours: &Figure) -> Option<String> {
        if ours.who != "viaduct" {
            return None;
        }
        let same = |f: &&Figure| {
            f.row == ours.row && f.metric == ours.metric && self.peers.contains(&f.who)
        };
        let of = |figure: &Figure| median(&figure.sorted());
        // Of rates more is better, of all else less.
        let better = |a: &&Figure, b: &&Figure| match ours.metric.ends_with("_per_s") {
            true => of(b).total_cmp(&of(a)),
            false => of(a).total_cmp(&of(b)),
        };
        let best = self.figures.iter().filter(same).min_by(better)?;
        let ratio = of(ours) / of(best);
        ratio
            .is_finite()
            .then(|| format!("{ratio:.2} of {}", best.who))
    }

    /// The same for people, with each figure relative to viaduct's of the same row and metric, and
    /// viaduct's to the best peer's.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{:<8} {:<21} {:<12} {:<24} {:>11} {:>11} {:>11} {:>6} {:>15}\n",
            "bench", "row", "who", "metric", "median", "min", "max", "rounds", "vs viaduct"
        );
        for figure in &self.figures {
            let sorted = figure.sorted();
            let ours = |f: &&Figure| {
                f.who == "viaduct" && f.row == figure.row && f.metric == figure.metric
            };
            let ratio = match self.figures.iter().find(ours) {
                Some(ours) if figure.who != "viaduct" => {
                    let ratio = median(&sorted) / median(&ours.sorted());
                    // Of nothing there is no ratio.
                    match ratio.is_finite() {
                        true => format!("{ratio:.2}x"),
                        false => String::new(),
                    }
                }
                _ => self.best_peer(figure).unwrap_or_default(),
            };
            let _ = writeln!(
                text,
                "{:<8} {:<21} {:<12} {:<24} {:>11.2} {:>11.2} {:>11.2} {:>6} {:>15}",
                self.bench,
                figure.row,
                figure.who,
                figure.metric,
                median(&sorted),
                sorted[0],
                sorted[sorted.len() - 1],
                sorted.len(),
                ratio,
            );
        }
        text
    }
}

impl Figure {
    /// Never empty: a figure starts with its first sample.
    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.samples.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

/// The middle of sorted samples; of two middles, their mean.
fn median(sorted: &[f64]) -> f64 {
    let upper = sorted[sorted.len() / 2];
    let lower = sorted[(sorted.len() - 1) / 2];
    f64::midpoint(lower, upper)
}

/// Three decimals are more than any of this repeats.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// The smallest sample that at least `share` of all samples do not exceed (nearest rank).
pub(crate) fn percentile(samples: &mut [f64], share: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let rank = (samples.len() as f64 * share).ceil() as usize;
    samples[rank.clamp(1, samples.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_median_least_and_greatest_of_its_rounds() {
        let mut report = Report::new("l7");
        for sample in [3.0, 1.0, 2.0] {
            report.add("get", "viaduct", "cpu_us_per_request", sample);
        }
        let wanted = concat!(
            r#"{"bench":"l7","row":"get","who":"viaduct","metric":"cpu_us_per_request","#,
            r#""median":2.0,"min":1.0,"max":3.0,"rounds":3}"#,
            "\n"
        );
        assert_eq!(report.json(), wanted);
    }

    #[test]
    fn ours_are_compared_with_the_best_peer() {
        let mut report = Report::beside("l7", &["nginx", "haproxy"]);
        for (who, sample) in [
            ("viaduct", 9.0),
            ("nginx", 10.0),
            ("haproxy", 12.0),
            ("direct", 1.0),
        ] {
            report.add("get", who, "cpu_us_per_request", sample);
            report.add("get", who, "requests_per_s", sample);
        }
        let table = report.table();
        assert!(table.contains("0.90 of nginx"), "{table}");
        assert!(table.contains("0.75 of haproxy"), "{table}");
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let mut samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&mut samples, 0.5), 50.0);
        assert_eq!(percentile(&mut samples, 0.99), 99.0);
        assert_eq!(percentile(&mut [7.0], 0.99), 7.0);
    }
}
