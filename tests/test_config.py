import pytest

from vllm_zipvl.config import ZipVLConfig


def test_defaults_without_an_entry():
    assert ZipVLConfig.from_additional_config({}) == ZipVLConfig()
    assert ZipVLConfig.from_additional_config({"other": 1}).tau == 0.99


@pytest.mark.parametrize(
    ("key", "value", "choices"),
    [
        ("tau", 0, "above 0 and at most 1"),
        ("tau", 1.5, "above 0 and at most 1"),
        ("tau", "0.9", "above 0 and at most 1"),
        ("tau", float("nan"), "above 0 and at most 1"),
        ("ratio", 0, "null or a number above 0"),
        ("max_kept", True, "above 0 and at most 1"),
        ("high_bits", 2, "one of (16, 8, 4)"),
        ("high_bits", 4.5, "one of (16, 8, 4)"),
        ("low_bits", 3, "one of (16, 8, 4, 2, 0)"),
        ("low_bits", 8, "at most high_bits"),
        ("low_bits", False, "one of"),
        ("probe_recent", 0, "a whole number of at least 1"),
        ("probe_random", -1, "a whole number of at least 0"),
        ("min_tokens", 0, "a whole number of at least 1"),
        ("interval", 1.0, "a whole number of at least 1"),
        ("residual", -1, "a whole number of at least 0"),
        ("seed", "7", "a whole number of at least 0"),
        ("sparse_prefill", 1, "true or false"),
        ("compress", "yes", "true or false"),
        ("prefill_kernel", "fa3", "one of ('auto', 'flash_attn', 'triton')"),
        ("prefix_sharing", "off", "one of ('alike', 'approximate', 'exact')"),
    ],
)
def test_an_error_names_key_value_and_choices(key, value, choices):
    with pytest.raises(ValueError) as raised:
        ZipVLConfig.from_additional_config({"zipvl": {key: value}})
    message = str(raised.value)
    assert f"zipvl.{key} = {value!r}" in message
    assert choices in message
    assert "\n" not in message


def test_with_both_halves_off_there_would_be_nothing_to_do():
    with pytest.raises(ValueError, match="compress = False must be true where zipvl.sparse_pre"):
        ZipVLConfig(sparse_prefill=False, compress=False)


def test_an_unknown_key_is_an_error():
    with pytest.raises(ValueError, match="zipvl.taau = 0.9 is not a setting; the settings are"):
        ZipVLConfig.from_additional_config({"zipvl": {"taau": 0.9}})


def test_the_entry_must_be_an_object():
    with pytest.raises(ValueError, match="must be an object"):
        ZipVLConfig.from_additional_config({"zipvl": "tau=0.9"})
