//! What keys and values of a registry announce: a whole route each, or one instance of a service.
//!
//! Below `routes_prefix` a value is one declared route, in JSON or TOML, with the keys of
//! docs/routes.md. Below the prefix of a map a key is `SERVICE/INSTANCE`, its value where the instance
//! is, and the configuration says which routes a service has. Pure.

use std::net::SocketAddr;

use anyhow::{Context as _, anyhow, bail, ensure};
use ipnet::IpNet;
use serde_json::{Value, json};

use crate::config::InstanceMap;
use crate::route::Origin;
use crate::route::declared::{Announcement, DeclaredRoute};
use crate::source::store::MAX_VALUE_BYTES;

/// Which keys say what.
pub(crate) struct Layout<'a> {
    pub(crate) routes_prefix: &'a str,
    pub(crate) maps: &'a [InstanceMap],
}

impl<'a> Layout<'a> {
    /// What keys begin with that say something; none of them begins with another.
    pub(crate) fn prefixes(&self) -> Vec<&'a str> {
        let maps = self.maps.iter().map(|map| &*map.prefix);
        let mut prefixes: Vec<&'a str> = maps.collect();
        if !self.routes_prefix.is_empty() {
            prefixes.push(self.routes_prefix);
        }
        prefixes.sort_unstable();
        // What begins with another comes after it.
        prefixes.dedup_by(|next, kept| next.starts_with(*kept));
        prefixes
    }

    /// What a key says by its value.
    ///
    /// # Errors
    /// One message with the field.
    pub(crate) fn read(
        &self,
        key: &str,
        value: &[u8],
        origin: Origin,
        vip_ranges: &[IpNet],
    ) -> anyhow::Result<Announcement> {
        ensure!(
            value.len() <= MAX_VALUE_BYTES,
            "longer than {MAX_VALUE_BYTES} bytes"
        );
        let text = std::str::from_utf8(value).context("value: not UTF-8")?;
        let mut all = Announcement::default();
        if !self.routes_prefix.is_empty() && key.starts_with(self.routes_prefix) {
            all = declared(text)?.read(origin, vip_ranges)?;
        }
        for map in self.maps {
            let Some(name) = key.strip_prefix(&*map.prefix) else {
                continue;
            };
            let one = instance(map, name, text)?;
            let Some(instance) = one else { continue };
            let routes = announce(&map.uris, &map.vips, &instance, origin, vip_ranges)?;
            all.registrations.extend(routes.registrations);
        }
        Ok(all)
    }
}

/// One instance of a service.
#[derive(Debug, PartialEq)]
pub(crate) struct Instance<'a> {
    pub(crate) service: &'a str,
    pub(crate) id: &'a str,
    pub(crate) address: SocketAddr,
    pub(crate) weight: Option<u64>,
}

/// What an instance announces by routes in which `{service}` stands for its service.
pub(crate) fn announce(
    uris: &[String],
    vips: &[String],
    instance: &Instance<'_>,
    origin: Origin,
    vip_ranges: &[IpNet],
) -> anyhow::Result<Announcement> {
    let named = |routes: &[String]| -> Vec<String> {
        let named = |route: &String| route.replace("{service}", instance.service);
        routes.iter().map(named).collect()
    };
    let mut backend = json!({
        "address": instance.address,
        "app": instance.service,
        "instance_id": instance.id,
    });
    if let Some(weight) = instance.weight {
        backend["weight"] = json!(weight);
    }
    let route = json!({ "uris": named(uris), "vips": named(vips), "backend": [backend] });
    let route: DeclaredRoute = serde_json::from_value(route)?;
    route.read(origin, vip_ranges)
}

/// A route in either format.
fn declared(text: &str) -> anyhow::Result<DeclaredRoute> {
    match text.trim_start().starts_with('{') {
        true => Ok(serde_json::from_str(text)?),
        false => Ok(toml::from_str(text)?),
    }
}

/// What a map makes of a key below its prefix; `None`: nothing, the key is of something else.
fn instance<'a>(
    map: &InstanceMap,
    name: &'a str,
    text: &str,
) -> anyhow::Result<Option<Instance<'a>>> {
    let Some((service, id)) = name.split_once('/') else {
        // The folder of a service.
        return Ok(None);
    };
    let is_other = map.service.as_ref().is_some_and(|only| only != service);
    if is_other || id.is_empty() {
        return Ok(None);
    }
    ensure!(!id.contains('/'), "key: deeper than SERVICE/INSTANCE");
    let text = text.trim();
    if !text.starts_with('{') {
        let address = address(text)?;
        let untagged = map.tag.is_none();
        return Ok(untagged.then_some(Instance {
            service,
            id,
            address,
            weight: None,
        }));
    }
    let value: Value = serde_json::from_str(text)?;
    if let Some(tag) = &map.tag
        && !has_tag(field(&value, &map.tags), tag).with_context(|| map.tags.clone())?
    {
        return Ok(None);
    }
    let host = match field(&value, &map.host) {
        Value::String(host) => host,
        Value::Null => bail!("{}: missing", map.host),
        _ => bail!("{}: not text", map.host),
    };
    let port = number(field(&value, &map.port)).with_context(|| map.port.clone())?;
    let port = port.with_context(|| format!("{}: missing", map.port))?;
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse();
    let ip = ip.map_err(|_| anyhow!("{}: {host:?} is not an address", map.host))?;
    let port = u16::try_from(port).with_context(|| format!("{}: {port} is no port", map.port))?;
    Ok(Some(Instance {
        service,
        id,
        address: SocketAddr::new(ip, port),
        weight: number(field(&value, &map.weight)).with_context(|| map.weight.clone())?,
    }))
}

fn address(text: &str) -> anyhow::Result<SocketAddr> {
    let address = text.parse();
    address.map_err(|_| anyhow!("value: {text:?} is neither ADDRESS:PORT nor a JSON object"))
}

/// What stands at `a.b` of an object; null where nothing does.
fn field<'a>(value: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(value, |value, name| &value[name])
}

/// Numbers are often written as text.
fn number(value: &Value) -> anyhow::Result<Option<u64>> {
    let number = match value {
        Value::Null => return Ok(None),
        Value::String(text) => text.parse().ok(),
        _ => value.as_u64(),
    };
    let number = number.with_context(|| format!("{value} is not a number"))?;
    Ok(Some(number))
}

/// Of a list, or of text with commas.
fn has_tag(tags: &Value, tag: &str) -> anyhow::Result<bool> {
    match tags {
        Value::Null => Ok(false),
        Value::Array(tags) => Ok(tags.iter().any(|one| one == tag)),
        Value::String(tags) => Ok(tags.split(',').any(|one| one.trim() == tag)),
        _ => bail!("not a list of tags"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps() -> Vec<InstanceMap> {
        let text = r#"
            [[map]]
            prefix = "/services/"
            uris = ["{service}.apps.x", "all.x/{service}"]
            vips = ["tcp/192.0.2.1:80"]
            [[map]]
            prefix = "/discovery/"
            service = "shop"
            uris = ["shop.x"]
            tag = "web"
            host = "serviceEndpoint.host"
            port = "serviceEndpoint.port"
        "#;
        #[derive(serde::Deserialize)]
        struct Maps {
            map: Vec<InstanceMap>,
        }
        toml::from_str::<Maps>(text).unwrap().map
    }

    fn read(key: &str, value: &str) -> Result<Vec<String>, String> {
        let layout = Layout {
            routes_prefix: "/routes/",
            maps: &maps(),
        };
        let ranges = ["192.0.2.0/24".parse().unwrap()];
        let read = layout.read(key, value.as_bytes(), Origin::Etcd, &ranges);
        let read = read.map_err(|error| format!("{error:#}"))?;
        let lines = read.registrations.iter().flat_map(|registration| {
            let backend = &registration.backend;
            let line = format!("{} {}", backend.address, backend.weight);
            let routes = registration.routes.iter();
            routes.map(move |route| format!("{route} {line}"))
        });
        Ok(lines.collect())
    }

    #[test]
    fn a_value_is_a_route_or_where_an_instance_is() {
        let of_instance = |service: &str, backend: &str| {
            vec![
                format!("{service}.apps.x {backend}"),
                format!("all.x/{service} {backend}"),
                format!("tcp/192.0.2.1:80 {backend}"),
            ]
        };
        let json = r#"{"uris":["a.x"],"backend":[{"address":"10.0.0.1:80"}]}"#;
        let toml = "uris = [\"a.x\"]\nbackend = [{ address = \"10.0.0.1:80\" }]\n";
        let one = vec!["a.x 10.0.0.1:80 100".to_owned()];
        assert_eq!(read("/routes/a", json), Ok(one.clone()));
        assert_eq!(read("/routes/deep/a", toml), Ok(one));
        assert_eq!(
            read("/services/shop/1", " 10.0.0.1:80\n"),
            Ok(of_instance("shop", "10.0.0.1:80 100"))
        );
        assert_eq!(
            read(
                "/services/shop/1",
                r#"{"host":"2001:db8::1","port":"81","weight":7,"other":[]}"#
            ),
            Ok(of_instance("shop", "[2001:db8::1]:81 7"))
        );
        assert_eq!(read("/services/shop", "anything"), Ok(vec![]));
        let endpoint = r#"{"serviceEndpoint":{"host":"10.0.0.1","port":80},"tags":"a, web"}"#;
        let shop = vec!["shop.x 10.0.0.1:80 100".to_owned()];
        assert_eq!(read("/discovery/shop/1", endpoint), Ok(shop));
        assert_eq!(read("/discovery/other/1", endpoint), Ok(vec![]));
        let untagged = endpoint.replace("web", "db");
        assert_eq!(read("/discovery/shop/1", &untagged), Ok(vec![]));
    }

    #[test]
    fn a_value_is_refused_by_the_name_of_its_field() {
        for (key, value, why) in [
            ("/routes/a", "{", "EOF"),
            ("/routes/a", r#"{"urls":[]}"#, "urls"),
            ("/routes/a", r#"{"uris":["a b"]}"#, "host"),
            (
                "/routes/a",
                r#"{"vips":["tcp/10.0.0.1:80"],"backend":[{"address":"10.0.0.1:80"}]}"#,
                "vips[0]",
            ),
            ("/services/s/1", "", "value: "),
            ("/services/s/1", "backend:80", "value: "),
            ("/services/s/1", r#"{"port":80}"#, "host: missing"),
            ("/services/s/1", r#"{"host":1,"port":80}"#, "host: not text"),
            ("/services/s/1", r#"{"host":"b","port":80}"#, "host: "),
            ("/services/s/1", r#"{"host":"10.0.0.1"}"#, "port: missing"),
            (
                "/services/s/1",
                r#"{"host":"10.0.0.1","port":[]}"#,
                "port: ",
            ),
            (
                "/services/s/1",
                r#"{"host":"10.0.0.1","port":65536}"#,
                "port: ",
            ),
            ("/services/s/1", r#"{"host":"10.0.0.1","port":0}"#, "port 0"),
            (
                "/services/s/1",
                r#"{"host":"10.0.0.1","port":1,"weight":1001}"#,
                "weight",
            ),
            (
                "/discovery/shop/1",
                r#"{"serviceEndpoint":{"host":"10.0.0.1","port":80},"tags":1}"#,
                "tags: ",
            ),
            ("/services/a b/1", "10.0.0.1:80", "host"),
            ("/services/s/1/2", "10.0.0.1:80", "key: "),
        ] {
            let error = read(key, value).expect_err(value);
            assert!(
                error.contains(why),
                "{key} {value}: {error:?} lacks {why:?}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn no_value_stops_it(
            key in "(/routes/|/services/|/discovery/)[a-z/]{0,6}",
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..64),
            json in r#"\{"(host|port|tags|weight)":("[0-9.:]{0,9}"|[0-9]{1,20}|null|\[\]),"port":[0-9]{1,6}\}"#,
        ) {
            let layout = Layout { routes_prefix: "/routes/", maps: &maps() };
            for value in [&bytes[..], json.as_bytes()] {
                let _ = layout.read(&key, value, Origin::Etcd, &[]);
            }
        }
    }

    #[test]
    fn no_key_is_read_by_two_prefixes() {
        let mut maps = maps();
        maps[1].prefix = "/services/inner/".to_owned();
        let layout = Layout {
            routes_prefix: "/routes/",
            maps: &maps,
        };
        assert_eq!(layout.prefixes(), ["/routes/", "/services/"]);
    }
}
