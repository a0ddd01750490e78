"""Primitives against published vectors: RFC 5869, 7748, 8032, 8439, 9162 and NIST SP 800-38A."""

from __future__ import annotations

import numpy as np
import pytest

from securefedcollm.errors import CryptoError
from securefedcollm.primitives import (
    AgreementKey,
    Keystream,
    SigningKey,
    hkdf,
    merkle_root,
    seal,
    unseal,
    verify,
)

unhex = bytes.fromhex


def test_x25519_rfc_7748_section_6_1() -> None:
    alice = AgreementKey(unhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"))
    bob = AgreementKey(unhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb"))
    assert alice.public == unhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    assert bob.public == unhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = unhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert alice.agree(bob.public) == bob.agree(alice.public) == shared


@pytest.mark.parametrize(
    "point",
    [
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ],
)
def test_points_of_small_order_are_refused(point: str) -> None:
    with pytest.raises(CryptoError, match="small order"):
        AgreementKey(bytes(range(32))).agree(unhex(point))


def test_a_key_has_one_spelling() -> None:
    """Adversary: a silo that has its peer's key counted as another; X25519 reads both alike."""
    own, peer = AgreementKey(bytes(range(32))), AgreementKey(bytes(range(1, 33)))
    respelled = peer.public[:31] + bytes([peer.public[31] | 0x80])
    beyond = (9 + 2**255 - 19).to_bytes(32, "little")  # the base point, 9, modulo p
    assert own.agree(peer.public)
    assert own.agree((9).to_bytes(32, "little"))
    for public in (respelled, beyond, b"", peer.public + b"x"):
        with pytest.raises(CryptoError, match="malformed"):
            own.agree(public)


@pytest.mark.parametrize(
    ("seed", "public"),
    [  # RFC 8032 §7.1, tests 1 and 2
        (
            "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        ),
        (
            "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        ),
    ],
)
def test_ed25519_keys_of_rfc_8032(seed: str, public: str) -> None:
    key = SigningKey(unhex(seed))
    assert key.public == unhex(public)
    assert key.seed() == unhex(seed)
    assert seed[:16] not in repr(key)


def test_a_signature_holds_for_its_context_key_and_message_only() -> None:
    key, other = SigningKey(bytes(32)), SigningKey(bytes([1]) * 32)
    signature = key.sign(b"context", b"message")
    verify(key.public, b"context", b"message", signature)
    for public, context, message in (
        (other.public, b"context", b"message"),
        (key.public, b"contexts", b"message"),
        (key.public, b"context", b"message "),
        (b"short", b"context", b"message"),
    ):
        with pytest.raises(CryptoError):
            verify(public, context, message, signature)


@pytest.mark.parametrize("context", [b"", b"a\0b"])
def test_contexts_that_could_be_confused_are_refused(context: bytes) -> None:
    with pytest.raises(ValueError, match="context"):
        SigningKey(bytes(32)).sign(context, b"")


def test_hkdf_rfc_5869_case_1() -> None:
    okm = hkdf(
        unhex("0b" * 22),
        salt=unhex("000102030405060708090a0b0c"),
        info=unhex("f0f1f2f3f4f5f6f7f8f9"),
        length=42,
    )
    assert okm == unhex(
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )


@pytest.mark.parametrize(("salt", "info"), [(b"", b"x"), (b"x", b"")])
def test_hkdf_without_binding_is_refused(salt: bytes, info: bytes) -> None:
    with pytest.raises(ValueError, match="salt and an info"):
        hkdf(b"secret", salt=salt, info=info)


def test_chacha20_poly1305_rfc_8439_section_2_8_2() -> None:
    key = bytes(range(0x80, 0xA0))
    nonce, associated = unhex("070000004041424344454647"), unhex("50515253c0c1c2c3c4c5c6c7")
    plaintext = (
        b"Ladies and Gentlemen of the class of '99: "
        b"If I could offer you only one tip for the future, sunscreen would be it."
    )
    box = seal(key, nonce, plaintext, associated)
    assert box[:16] == unhex("d31a8d34648e60db7b86afbc53ef7ec2")
    assert box[-16:] == unhex("1ae10b594f09e26a7e902ecbd0600691")
    assert unseal(key, nonce, box, associated) == plaintext
    for wrong in (box[:-1], bytes([box[0] ^ 1]) + box[1:], b""):
        with pytest.raises(CryptoError):
            unseal(key, nonce, wrong, associated)
    with pytest.raises(CryptoError):
        unseal(key, nonce, box, associated + b"x")


def test_keystream_sp_800_38a_f_5_5() -> None:
    key = unhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = unhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = unhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    # The vector's initial counter block is a position in our stream, which begins at block zero.
    position = int.from_bytes(unhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
    buffer = bytearray(64)
    Keystream(key, offset=16 * position).into(memoryview(buffer))
    assert bytes(a ^ b for a, b in zip(buffer, plain, strict=True)) == cipher


def test_keystream_is_seekable_across_its_chunks() -> None:
    key = bytes(range(32))
    whole = Keystream(key).words(60_000)
    assert np.array_equal(Keystream(key, offset=8 * 40_000).words(20_000), whole[40_000:])
    with pytest.raises(ValueError, match="16-byte"):
        Keystream(key, offset=8)
    with pytest.raises(ValueError, match="32 bytes"):
        Keystream(key[:16])


def test_merkle_root_reference_tree() -> None:
    leaves = [
        unhex(leaf)
        for leaf in (
            "",
            "00",
            "10",
            "2021",
            "3031",
            "40414243",
            "5051525354555657",
            "606162636465666768696a6b6c6d6e6f",
        )
    ]
    roots = {
        0: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        5: "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    }
    for count, root in roots.items():
        assert merkle_root(leaves[:count]).hex() == root
