//! Images of every kind become JSON and the same bytes again.

mod common;
mod synthetic;

use proptest::prelude::*;
use rewake_crit::{Form, Layout, Payloads, decode_as, encode, write_json};
use serde_json::Value;

use synthetic::Dice;

fn text(value: &Value, layout: Layout) -> Vec<u8> {
    let mut out = Vec::new();
    write_json(&mut out, value, layout).unwrap();
    out
}

fn goes_round(image: &[u8]) {
    for (form, layout) in [(Form::Plain, Layout::Line), (Form::Pretty, Layout::Indented)] {
        let json = decode_as(image, form, Payloads::Whole).unwrap();
        let read: Value = serde_json::from_slice(&text(&json, layout)).unwrap();
        assert_eq!(read, json, "the text says something else");
        assert_eq!(
            encode(&read).unwrap(),
            image,
            "{}",
            String::from_utf8_lossy(&text(&json, Layout::Line))
        );
    }
}

#[test]
fn every_kind_with_every_field() {
    for (seed, kind) in (0..).zip(synthetic::kinds()) {
        let image = synthetic::image(kind, &mut Dice(seed), true);
        goes_round(&image);
        let json = decode_as(&image, Form::Plain, Payloads::Whole).unwrap();
        let entry = json["entries"][0].as_object().unwrap();
        for field in kind.message_at(0).unwrap().fields {
            assert!(entry.contains_key(field.name), "{}: {} is lost", kind.name, field.name);
        }
    }
}

#[test]
fn empty_lists() {
    for kind in synthetic::kinds() {
        let image = common::header(kind);
        assert_eq!(
            decode_as(&image, Form::Plain, Payloads::Whole).unwrap()["entries"],
            serde_json::json!([])
        );
        goes_round(&image);
    }
}

#[test]
fn kinds_that_share_a_number_are_the_first_of_them() {
    let shmem = rewake_image::kind::by_name("SHMEM_PAGEMAP").unwrap();
    let json = decode_as(&common::header(shmem), Form::Plain, Payloads::Whole).unwrap();
    assert_eq!(json["magic"], "PAGEMAP");
}

#[test]
fn version_1_images_become_version_1_1() {
    let kind = rewake_image::kind::by_name("FDINFO").unwrap();
    let image = synthetic::image(kind, &mut Dice(1), true);
    let json = decode_as(&image[4..], Form::Plain, Payloads::Whole).unwrap();
    assert_eq!(json["magic"], "FDINFO");
    assert_eq!(encode(&json).unwrap(), image);
}

/// Flips bits, cuts and repeats: what an image may look like that somebody made to do harm.
fn damage(image: &mut Vec<u8>, dice: &mut Dice) {
    for _ in 0..=dice.below(4) {
        let at = dice.below(image.len().max(1) as u64) as usize;
        match dice.below(5) {
            0 => image.truncate(at),
            1 => image.extend_from_within(at..),
            2 if at < image.len() => image[at] = 0xff,
            3 if at < image.len() => drop(image.remove(at)),
            _ if at < image.len() => image[at] ^= 1 << dice.below(8),
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_kind_with_any_content(seed: u64) {
        for kind in synthetic::kinds() {
            goes_round(&synthetic::image(kind, &mut Dice(seed), false));
        }
    }

    #[test]
    fn damaged_images_are_refused_or_go_round(seed: u64) {
        let mut dice = Dice(seed);
        for kind in synthetic::kinds() {
            let mut image = synthetic::image(kind, &mut dice, false);
            let header = common::header(kind).len();
            let mut body = image.split_off(header);
            damage(&mut body, &mut dice);
            image.extend(body);
            for form in [Form::Plain, Form::Pretty] {
                let _ = decode_as(&image, form, Payloads::Sizes);
                let Ok(json) = decode_as(&image, form, Payloads::Whole) else { continue };
                // The bytes may have been encoded in another way, but what they say stays.
                let again = encode(&json).unwrap();
                prop_assert_eq!(decode_as(&again, form, Payloads::Whole).unwrap(), json);
            }
        }
    }

    #[test]
    fn any_json_is_refused_or_becomes_an_image(seed: u64) {
        let mut dice = Dice(seed);
        for kind in synthetic::kinds() {
            let image = synthetic::image(kind, &mut dice, false);
            let mut json = decode_as(&image, Form::Pretty, Payloads::Whole).unwrap();
            spoil(&mut json, &mut dice);
            if let Ok(image) = encode(&json) {
                prop_assert!(decode_as(&image, Form::Plain, Payloads::Whole).is_ok());
            }
        }
    }
}

/// Puts something else in a random place.
fn spoil(json: &mut Value, dice: &mut Dice) {
    let child = match json {
        Value::Array(items) if !items.is_empty() => {
            let at = dice.below(items.len() as u64) as usize;
            items.get_mut(at)
        }
        Value::Object(members) if !members.is_empty() => {
            let at = dice.below(members.len() as u64) as usize;
            members.values_mut().nth(at)
        }
        _ => None,
    };
    match child {
        Some(child) if dice.below(8) != 0 => spoil(child, dice),
        _ => {
            let others = [
                Value::Null,
                true.into(),
                u64::MAX.into(),
                (-1).into(),
                0.5.into(),
                1e300.into(),
                "".into(),
                "0x".into(),
                "::".into(),
                "1:2".into(),
                "PROT_READ | 1".into(),
                vec![Value::Null].into(),
                serde_json::json!({"extra": 1}),
                serde_json::json!({"base64": "!"}),
            ];
            *json = others[dice.below(others.len() as u64) as usize].clone();
        }
    }
}
