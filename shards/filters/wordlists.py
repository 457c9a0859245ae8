"""Small lists of words by kind of toxicity, and of the vocabulary of fields that need some of them.

Nobody should have to read these to read the code, or find them by a search: profanity, sexual words and violence are kept
in rot13, slurs as the upper 48 bits of their words' XXH3 hashes.
"""

from __future__ import annotations

import codecs

import xxhash

_PROFANITY = """
cevpx cevpxf cvff cvffrq cvffvat fuvg fuvgf fuvggl fuvggvat fuvgurnq fxnax fyhg fyhgf gbffre gjng gjngf jnaxre jnaxref juber
juberf nff nffrf nffubyr nffubyrf obyybpxf ohttre ohyyfuvg onfgneq onfgneqf onqnff ovgpu ovgpul ovgpurf ovgpuvat oybbql penc
penccl phag phagf qbhpur qbhpuront qhzonff qnza qnzarq qvcfuvg qvpxurnq qvpxurnqf shpx shpxf shpxre shpxref shpxrq shpxurnq
shpxva shpxvat tbqqnza tbqqnzarq ubefrfuvg wnpxnff zbgureshpxre zbgureshpxref zbgureshpxvat
"""
_SEXUAL = """
ahqrf ahqvgl betl betnfz cbea cbeab cbeabtencul cbeabtencuvp cebfgvghgr cebfgvghgrf chffl chffvrf cravf erpghz fbsgpber
fcrez fgevccre fgevccref frkgvat frzra fyhggl gvgf gvggl gvggvrf intvan ivoengbe kkk nany obaqntr obare obbof oernfg oernfgf
oqfz oybjwbo pbpx pbpxf pernzcvr phz phzfubg pyvgbevf qvpxf qvyqb rebgvpn rerpgvba rfpbegf snpvny srgvfu tnatonat ubeal
unaqwbo unaqwbof uneqpber uragnv wvmm znfgheongr znfgheongvat znfgheongvba zvys
"""
_VIOLENCE = """
encr encrf encrq encvat encvfg fgenatyr fgenatyrq fgno fgnoorq fgnoovat fubbg fubbgvat fynhtugre fynhtugrerq gbegher
gbegherq gbeghevat greebevfg nffnhyg obzovat orurnq orurnqrq orurnqvat oybbqfurq oyrrq qrpncvgngr qvfrzobjry qvfzrzore
qvfzrzorerq rkrphgr rkrphgrq tbel tber trabpvqr xvyy xvyyf xvyyrq xvyyvat ylapu ylapurq ylapuvat zheqre zheqref zheqrerq
zheqrevat zhgvyngr zhgvyngrq znffnper znffnperq
"""
_SLURS = """
078076d3227c 08d816e7374b 0cd0ef11ba12 0ddc8fbf8faa 0df33211a6b0 13b6f30c53cf 199db68e4937 1e24f99008bc 1e71c4724a73
20187a806e61 206fe0b97ddd 23982ae32dad 260287aedf94 26af2e2067e4 283cbfde61d0 345e03ec8bc6 396cc0e9af60 3c931ce5a3e6
46a9dec4690f 48ff5306b40b 4bfc3ba7c807 4f79bf60bde0 514e600112f3 543d06a8dd5d 544d17ab61d9 57d6148fdf1a 5bacfca30b11
5d00638eafb7 5fcf008eff5c 63c6e9615b82 6405dfd09b87 6deb6fcfdfee 6e445bc607d0 70c11b48a4c2 72263f9af945 725969773a51
79948c3dcf8a 7b0f674dea8a 7fc7746e2df4 80c579357adc 820b1d4b0730 8625ebb6b87b 8b7e8afe2e03 8bf349e12bef 93eeb1375124
96558be57f2e 9982c621a018 9f79ebcd30f4 9fda15df48ad a3f709d02369 a43179af7c10 afb45f9192c8 b323e42702b6 b7c13bd7eb5e
bb928415b24b be64e333d357 c14f82efd710 c25899aaf02f c447308d6eb9 c72c1760179f c84d23d85ed1 cfa6590f5d99 d08ef501503e
d33d7e7b2beb d352ece5098a d738ee987a69 e527d554de39 e7784875bde3 f13fc967b652 f5df705d9b17 f7f87ac587e4 f9b49ba728a8
fef8a2f05c14
"""
_NEEDED_SLURS = """
078076d3227c 0ddc8fbf8faa 1e24f99008bc 20187a806e61 283cbfde61d0 46a9dec4690f 514e600112f3 5fcf008eff5c 63c6e9615b82
6405dfd09b87 72263f9af945 79948c3dcf8a 7fc7746e2df4 820b1d4b0730 8625ebb6b87b 96558be57f2e 9f79ebcd30f4 be64e333d357
cfa6590f5d99 d08ef501503e f5df705d9b17
"""
_NEEDED = """
ahqvgl betnfz cbeabtencul cbeabtencuvp cebfgvghgr cebfgvghgrf cevpx cravf erpghz fcrez frzra intvan ivoengbe juber juberf
nany nff nffrf obaqntr oernfg oernfgf onfgneq onfgneqf oybbql pbpx pyvgbevf rerpgvba rfpbegf snpvny srgvfu znfgheongr
znfgheongvat znfgheongvba
"""

# Words of the fields above, by which a text of theirs is known.
_FIELDS = """
patient patients clinical treatment therapy diagnosis symptoms disease cancer tumour tumor surgery surgical infection dose
tissue hormone uterus pregnancy cervical pelvic urinary prostate menstrual contraception hospital physician nurse medicine
medical health biopsy lesion syndrome anatomy anatomical nerve artery vein species mammals reproductive fertility
court courts plaintiff defendant appellant statute statutory jurisdiction counsel prosecution indictment verdict judge jury
convicted sentence testimony witness witnesses offence offense penal code act section appeal tribunal criminal evidence
century centuries empire war wars treaty king queen colony colonial colonies army troops siege revolution parliament republic
dynasty historian historians medieval slavery slave slaves abolition emancipation plantation segregation census novel poem
poet literature translated edition manuscript chapter church bishop province regiment soldiers invasion massacre archives
"""


def digest(word: str) -> int:
    """The number that a slur is known by."""
    return xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) >> 16


def _plain(words: str) -> frozenset[str]:
    return frozenset(codecs.decode(words, "rot13").split())


def _hashes(words: str) -> frozenset[int]:
    return frozenset(int(word, 16) for word in words.split())


WORDS = {"profanity": _plain(_PROFANITY), "sexual": _plain(_SEXUAL), "violence": _plain(_VIOLENCE)}
SLURS = _hashes(_SLURS)
NEEDED = _plain(_NEEDED) | WORDS["violence"]
"""Words that medicine, law, history and literature use without offence."""
NEEDED_SLURS = _hashes(_NEEDED_SLURS)
"""Slurs that old documents and works on them quote."""
FIELDS = frozenset(_FIELDS.split())
