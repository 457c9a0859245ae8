"""What the namespaces of files and of categories are called in Wikipedia's languages, in small letters.

A dump names each namespace once, as its language does today. Its pages use older names and other scripts' too (MediaWiki's
`$namespaceAliases`), which no dump lists: `Bild:` of German, `圖像:` of Chinese. No wiki has articles under these prefixes.
"""

from __future__ import annotations

_FILES = """
file image media datei bild medium bestand afbeelding fil billede bilde mynd skrá lêer beeld triem ofbyld prent
fichier média archivo imagen medio ficheiro arquivo imagem multimédia multimídia mídia immagine fitxer imatge fișier fişier imagine
imaxe fasciculus imago fitxièr imachen imache dosiero bildo
plik grafika soubor obrázek súbor obrázok datoteka slika датотека слика файл изображение медиа зображення медіа картинка выява
attēls vaizdas
tiedosto kuva fail pilt fájl kép fitxategi irudi αρχείο εικόνα íomhá delwedd restr skeudenn skeda skedar
dosya resim fayl şəkil сурет рәсем պատկեր ფაილი სურათი
קובץ תמונה ملف صورة پرونده تصویر رسانه wêne وێنە پەڕگە
चित्र छवि चित्रम् छबी চিত্র ছবি படிமம் கோப்பு దస్త్రం బొమ్మ చిత్రం ಚಿತ್ರ പ്രമാണം ചിത്രം ਤਸਵੀਰ ਚਿੱਤਰ ચિત્ર ගොනුව රූපය
文件 档案 檔案 文檔 图像 圖像 图片 圖片 影像 媒体 媒體 ファイル 画像 メディア 파일 그림 미디어
ไฟล์ ภาพ สื่อ tập_tin hình phương_tiện berkas gambar imej larawan talaksan picha faili
"""
_CATEGORIES = """
category kategorie catégorie categoría categoria categorie kategoria kategória kategorija kategori kategorio kategooria luokka
категорија категория категорія категорыя κατηγορία קטגוריה تصنيف رده श्रेणी বিষয়শ্রেণী
分类 分類 カテゴリ 분류 หมวดหมู่ thể_loại
"""


def _names(words: str) -> frozenset[str]:
    return frozenset(word.replace("_", " ") for word in words.split())


FILES, CATEGORIES = _names(_FILES), _names(_CATEGORIES)
