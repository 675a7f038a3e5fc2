//! The proof that a request has been to its route's service: what the gateway sends along, and finds
//! in the request that comes back.
//!
//! gorouter's format, so that gateways of both kinds take each other's. `X-CF-Proxy-Signature` is
//! `{"forwarded_url","requested_time"}` under AES-128-GCM, `X-CF-Proxy-Metadata` is `{"nonce"}`, both
//! JSON in padded base64url. The key is PBKDF2-HMAC-SHA256 of the secret without salt. Pure but for
//! the nonce, which is random.

use std::fmt;
use std::num::NonZeroU32;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::pbkdf2;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::l7::route_service::timestamp;

const ITERATIONS: NonZeroU32 = NonZeroU32::new(100_001).expect("not zero");
const KEY_LEN: usize = 16;

/// The values of the two headers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Signature {
    pub signature: String,
    pub metadata: String,
}

/// Signs with the current secret, and takes what the one before has signed.
pub(in crate::l7) struct Keys {
    current: LessSafeKey,
    previous: Option<LessSafeKey>,
    random: SystemRandom,
}

/// Why a signature does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidSignature {
    NoMetadata,
    /// Not base64url, or not the JSON it should be.
    Malformed,
    /// Of none of the secrets, or altered.
    Forged,
    Expired,
    /// What was signed is a request of another route.
    OtherRoute,
}

#[derive(Serialize, Deserialize)]
struct Contents {
    forwarded_url: String,
    /// RFC 3339.
    requested_time: String,
}

#[derive(Serialize, Deserialize)]
struct Metadata {
    /// Standard base64.
    nonce: String,
}

impl Keys {
    /// Takes some ten milliseconds for each secret.
    pub(super) fn new(secret: &str, previous: Option<&str>) -> Keys {
        Keys {
            current: key(secret),
            previous: previous.map(key),
            random: SystemRandom::new(),
        }
    }

    /// `None` if the system has no random numbers.
    pub(super) fn sign(&self, forwarded_url: &str, now: SystemTime) -> Option<Signature> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let contents = Contents {
            forwarded_url: forwarded_url.to_owned(),
            requested_time: timestamp::format(now),
        };
        let mut sealed = serde_json::to_vec(&contents).ok()?;
        let sealing = Nonce::assume_unique_for_key(nonce);
        (self.current)
            .seal_in_place_append_tag(sealing, Aad::empty(), &mut sealed)
            .ok()?;
        let metadata = Metadata {
            nonce: STANDARD.encode(nonce),
        };
        Some(Signature {
            signature: URL_SAFE.encode(sealed),
            metadata: URL_SAFE.encode(serde_json::to_vec(&metadata).ok()?),
        })
    }

    /// The URL that was signed, at most `timeout` before `now`.
    ///
    /// # Errors
    /// Why the signature does not hold; never [`InvalidSignature::OtherRoute`].
    pub(super) fn verify(
        &self,
        signature: &[u8],
        metadata: &[u8],
        now: SystemTime,
        timeout: Duration,
    ) -> Result<String, InvalidSignature> {
        if metadata.is_empty() {
            return Err(InvalidSignature::NoMetadata);
        }
        let malformed = InvalidSignature::Malformed;
        let metadata = URL_SAFE.decode(metadata).map_err(|_| malformed)?;
        let Metadata { nonce } = serde_json::from_slice(&metadata).map_err(|_| malformed)?;
        let nonce = STANDARD.decode(nonce).map_err(|_| malformed)?;
        let nonce: [u8; NONCE_LEN] = nonce.try_into().map_err(|_| malformed)?;
        let sealed = URL_SAFE.decode(signature).map_err(|_| malformed)?;

        let keys = [Some(&self.current), self.previous.as_ref()];
        let mut opened = keys.into_iter().flatten().map(|key| {
            // Opening in place destroys what it cannot open.
            let mut text = sealed.clone();
            let nonce = Nonce::assume_unique_for_key(nonce);
            let len = key
                .open_in_place(nonce, Aad::empty(), &mut text)
                .ok()?
                .len();
            text.truncate(len);
            Some(text)
        });
        let text = opened.find_map(|text| text);
        let text = text.ok_or(InvalidSignature::Forged)?;
        let contents: Contents = serde_json::from_slice(&text).map_err(|_| malformed)?;
        let requested = timestamp::parse(&contents.requested_time).ok_or(malformed)?;
        // Another gateway's clock may be ahead.
        match now.duration_since(requested) {
            Ok(age) if age > timeout => Err(InvalidSignature::Expired),
            _ => Ok(contents.forwarded_url),
        }
    }
}

fn key(secret: &str) -> LessSafeKey {
    let mut key = [0; KEY_LEN];
    let algorithm = pbkdf2::PBKDF2_HMAC_SHA256;
    pbkdf2::derive(algorithm, ITERATIONS, b"", secret.as_bytes(), &mut key);
    let key = UnboundKey::new(&AES_128_GCM, &key).expect("16 bytes are a key of AES-128");
    LessSafeKey::new(key)
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys")
    }
}

impl fmt::Display for InvalidSignature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            InvalidSignature::NoMetadata => "No metadata found",
            InvalidSignature::Malformed => "malformed signature or metadata",
            InvalidSignature::Forged => "message authentication failed",
            InvalidSignature::Expired => "route service request expired",
            InvalidSignature::OtherRoute => {
                "forwarded URL does not match the original request's route"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "route-service-secret";
    const TIMEOUT: Duration = Duration::from_secs(60);

    /// Deriving keys is slow, so all cases of a test share them.
    static KEYS: LazyLock<Keys> = LazyLock::new(|| Keys::new(SECRET, None));

    /// Made by Python's `cryptography` and `json`: the nonce is 0, 1, ... 11, and the text
    /// `{"forwarded_url":"https://a.com/cart?x=1\u0026y=2","requested_time":"2026-11-22T21:17:21.5+02:00"}`,
    /// with `&` escaped as Go escapes it.
    const SIGNATURE: &str = "e-wqGUf1g2fCp4WZo1o4iWImEtnOUndyeH2E7SRQpuPKT1zClcrMBSucUZ-6Uxeby4Sye\
        K89PSIA2JMj0Mmdw5sPYKCJ-cl4KsQbBvsPqI6sSFve1VgttaN-Wyy3Z9X0GTT4mZqa-o3sgg4gMUcJtalo";
    const METADATA: &str = "eyJub25jZSI6IkFBRUNBd1FGQmdjSUNRb0wifQ==";

    fn signed_at() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_375_041_500)
    }

    fn verify(keys: &Keys, signature: &str, metadata: &str) -> Result<String, InvalidSignature> {
        keys.verify(
            signature.as_bytes(),
            metadata.as_bytes(),
            signed_at(),
            TIMEOUT,
        )
    }

    #[test]
    fn what_another_implementation_signed_is_taken_until_it_expires() {
        let (signature, metadata) = (SIGNATURE.as_bytes(), METADATA.as_bytes());
        let after = |age| KEYS.verify(signature, metadata, signed_at() + age, TIMEOUT);
        let url = "https://a.com/cart?x=1&y=2".to_owned();
        assert_eq!(after(Duration::ZERO), Ok(url.clone()));
        assert_eq!(after(TIMEOUT), Ok(url));
        let late = after(TIMEOUT + Duration::from_millis(1));
        assert_eq!(late, Err(InvalidSignature::Expired));
    }

    #[test]
    fn a_signature_of_the_previous_secret_is_taken_and_none_is_made() {
        let rotated = Keys::new("new", Some(SECRET));
        assert!(verify(&rotated, SIGNATURE, METADATA).is_ok());
        let made = rotated.sign("https://a.com/", signed_at()).unwrap();
        let old = verify(&KEYS, &made.signature, &made.metadata);
        assert_eq!(old, Err(InvalidSignature::Forged));
        let only_new = Keys::new("new", None);
        assert!(verify(&only_new, &made.signature, &made.metadata).is_ok());
        let forgotten = verify(&only_new, SIGNATURE, METADATA);
        assert_eq!(forgotten, Err(InvalidSignature::Forged));
    }

    #[test]
    fn what_is_broken_is_told_apart() {
        let other_nonce = URL_SAFE.encode(r#"{"nonce":"AAECAwQFBgcICQoM"}"#);
        let short_nonce = URL_SAFE.encode(r#"{"nonce":"AAEC"}"#);
        for (signature, metadata, wanted) in [
            (SIGNATURE, "", InvalidSignature::NoMetadata),
            (SIGNATURE, "%", InvalidSignature::Malformed),
            (SIGNATURE, "e30=", InvalidSignature::Malformed),
            (SIGNATURE, &short_nonce, InvalidSignature::Malformed),
            (SIGNATURE, &other_nonce, InvalidSignature::Forged),
            ("+", METADATA, InvalidSignature::Malformed),
            ("", METADATA, InvalidSignature::Forged),
            ("AAAA", METADATA, InvalidSignature::Forged),
        ] {
            let result = verify(&KEYS, signature, metadata);
            assert_eq!(result, Err(wanted), "{signature:?} {metadata:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_signed_verifies_and_nothing_else_does(url: String, at: prop::sample::Index, flip in 1..=255_u8) {
            let made = KEYS.sign(&url, signed_at()).unwrap();
            prop_assert_eq!(verify(&KEYS, &made.signature, &made.metadata), Ok(url));
            let mut sealed = URL_SAFE.decode(&made.signature).unwrap();
            let at = at.index(sealed.len());
            sealed[at] ^= flip;
            let altered = verify(&KEYS, &URL_SAFE.encode(sealed), &made.metadata);
            prop_assert_eq!(altered, Err(InvalidSignature::Forged));
        }
    }
}
