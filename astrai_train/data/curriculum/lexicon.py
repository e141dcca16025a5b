"""A small English-Chinese lexicon written for the curriculum.

Every English word has one Chinese word here and the other way round, so that a translation
has one answer; a test keeps it so.
"""

from collections.abc import Iterator
from dataclasses import dataclass

# category | measure word | English=Chinese, ...
_NOUNS = """
animal | 只 | cat=猫, dog=狗, bird=鸟, chicken=鸡, duck=鸭子, sheep=羊, tiger=老虎, lion=狮子
animal | 只 | monkey=猴子, rabbit=兔子, mouse=老鼠, bear=熊, panda=熊猫, wolf=狼, fox=狐狸
animal | 只 | frog=青蛙, bee=蜜蜂, ant=蚂蚁, butterfly=蝴蝶, spider=蜘蛛, turtle=乌龟, goose=鹅
animal | 只 | eagle=鹰, owl=猫头鹰, penguin=企鹅, pigeon=鸽子, crab=螃蟹, deer=鹿
animal | 条 | fish=鱼, snake=蛇, shark=鲨鱼, dragon=龙
animal | 头 | cow=牛, pig=猪, elephant=大象, whale=鲸鱼
animal | 匹 | horse=马, camel=骆驼
fruit | 个 | apple=苹果, orange=橙子, pear=梨, peach=桃子, lemon=柠檬, mango=芒果, melon=甜瓜
fruit | 个 | watermelon=西瓜, strawberry=草莓, cherry=樱桃, plum=李子, grape=葡萄, pineapple=菠萝
fruit | 根 | banana=香蕉
vegetable | 个 | tomato=西红柿, potato=土豆, onion=洋葱, pumpkin=南瓜, cabbage=白菜, pepper=辣椒
vegetable | 根 | carrot=胡萝卜, cucumber=黄瓜
food | 个 | egg=鸡蛋, cake=蛋糕, dumpling=饺子, bun=包子, cookie=饼干, sandwich=三明治
food | 块 | chocolate=巧克力
vehicle | 辆 | car=汽车, bus=公共汽车, truck=卡车, bicycle=自行车, taxi=出租车, motorcycle=摩托车
vehicle | 艘 | ship=船
vehicle | 架 | plane=飞机
vehicle | 列 | train=火车
furniture | 张 | table=桌子, bed=床, sofa=沙发, desk=书桌
furniture | 把 | chair=椅子
furniture | 个 | cupboard=柜子, bookshelf=书架
clothes | 件 | shirt=衬衫, coat=外套, sweater=毛衣, dress=连衣裙
clothes | 条 | skirt=裙子, scarf=围巾
clothes | 顶 | hat=帽子
tool | 把 | knife=刀, umbrella=雨伞, key=钥匙, hammer=锤子, spoon=勺子, fork=叉子
tool | 把 | brush=刷子, comb=梳子
tool | 把 | ruler=尺子, lock=锁
tool | 支 | pen=钢笔, pencil=铅笔
tool | 个 | cup=杯子, bowl=碗, bottle=瓶子, box=盒子, bag=包, basket=篮子, plate=盘子, bell=铃
thing | 本 | book=书, dictionary=词典, diary=日记, magazine=杂志
thing | 张 | map=地图, ticket=票, photo=照片, card=卡片
thing | 封 | letter=信
thing | 份 | newspaper=报纸, gift=礼物
thing | 台 | computer=电脑, camera=照相机, television=电视, machine=机器
thing | 部 | phone=手机, film=电影
thing | 个 | clock=钟, ball=球, toy=玩具, lamp=灯, mirror=镜子, window=窗户, story=故事, dream=梦
thing | 个 | question=问题, word=词, number=数字, flag=旗子, balloon=气球, robot=机器人, game=游戏
thing | 扇 | door=门
thing | 面 | wall=墙
thing | 首 | song=歌, poem=诗
person | 个 | child=孩子, boy=男孩, girl=女孩, friend=朋友, student=学生, doctor=医生, nurse=护士
person | 个 | worker=工人, farmer=农民, soldier=士兵, driver=司机, singer=歌手, cook=厨师, baby=婴儿
person | 个 | king=国王, queen=王后, lawyer=律师, writer=作家, artist=艺术家
person | 位 | teacher=老师, guest=客人, scientist=科学家
place | 个 | city=城市, village=村庄, park=公园, garden=花园, station=车站
place | 个 | library=图书馆, market=市场
place | 个 | kitchen=厨房, island=岛, lake=湖, country=国家, world=世界
place | 个 | airport=机场, restaurant=饭馆
place | 所 | school=学校, university=大学
place | 家 | hospital=医院, shop=商店, hotel=酒店, factory=工厂, bank=银行
place | 座 | mountain=山, bridge=桥, tower=塔, house=房子, temple=寺庙
place | 条 | river=河, road=路, street=街道
nature | 棵 | tree=树
nature | 朵 | flower=花, cloud=云
nature | 片 | leaf=叶子, forest=森林
nature | 块 | stone=石头
nature | 颗 | star=星星, seed=种子
"""

_ADJECTIVES = """
big=大, small=小, new=新, old=旧, good=好, bad=坏, long=长, short=短, tall=高, thin=薄, thick=厚
heavy=重, light=轻, fast=快, slow=慢, cheap=便宜, expensive=贵, clean=干净, dirty=脏, beautiful=漂亮
ugly=丑, strong=强壮, weak=弱, happy=快乐, sad=悲伤, hot=热, cold=冷, soft=软, hard=硬, dry=干
wet=湿, quiet=安静, noisy=吵闹, famous=有名, strange=奇怪, important=重要, interesting=有趣
simple=简单, dangerous=危险, safe=安全, clever=聪明, cute=可爱, lazy=懒, brave=勇敢, round=圆
bright=明亮, empty=空, special=特别, young=年轻, modern=现代, ancient=古老
red=红色, blue=蓝色, green=绿色, yellow=黄色, white=白色, black=黑色, purple=紫色, brown=棕色
grey=灰色, pink=粉色, golden=金色
"""

# verbs that take any noun as an object, without inflection after I, you, we, they
_VERBS = (
    "like=喜欢, want=想要, have=有, see=看见, need=需要, buy=买, draw=画, remember=记得, love=爱"
)

_SUBJECTS = "I=我, you=你, we=我们, they=他们"

_OTHERS = """
eat=吃, drink=喝, sleep=睡觉, run=跑, walk=走路, swim=游泳, fly=飞, sing=唱歌, dance=跳舞, read=阅读
write=写, listen=听, speak=说, think=想, know=知道, learn=学习, work=工作, play=玩, laugh=笑, cry=哭
sit=坐, stand=站, open=打开, close=关, wait=等, help=帮助, ask=问, answer=回答, sell=卖, give=给
find=找到, forget=忘记, begin=开始, stop=停止, travel=旅行, wash=洗, jump=跳, fall=掉
win=赢, lose=输
water=水, tea=茶, milk=牛奶, coffee=咖啡, rice=米饭, bread=面包, meat=肉, soup=汤, salt=盐, sugar=糖
sun=太阳, moon=月亮, sky=天空, rain=雨, snow=雪, wind=风, fire=火, sea=大海, earth=地球, air=空气
father=父亲, mother=母亲, brother=兄弟, sister=姐妹, family=家庭, son=儿子, daughter=女儿
head=头, hand=手, foot=脚, eye=眼睛, ear=耳朵, nose=鼻子, mouth=嘴, hair=头发, heart=心, face=脸
today=今天, tomorrow=明天, yesterday=昨天, morning=早上, evening=晚上, noon=中午, year=年, month=月
week=星期, hour=小时, minute=分钟, spring=春天, summer=夏天, autumn=秋天, winter=冬天
music=音乐, history=历史, science=科学, language=语言, money=钱, time=时间, life=生活
peace=和平, health=健康, weather=天气, north=北方, south=南方, east=东方, west=西方
always=总是, often=经常, never=从不, together=一起, here=这里, there=那里, now=现在, very=非常
"""

_OPPOSITES = """
big-small, new-old, good-bad, long-short, heavy-light, fast-slow, cheap-expensive, clean-dirty
beautiful-ugly, strong-weak, happy-sad, hot-cold, soft-hard, dry-wet, quiet-noisy, thick-thin
dangerous-safe, white-black, modern-ancient
"""

_IRREGULAR_PLURALS = {
    "sheep": "sheep",
    "mouse": "mice",
    "wolf": "wolves",
    "goose": "geese",
    "deer": "deer",
    "fish": "fish",
    "tomato": "tomatoes",
    "potato": "potatoes",
    "mango": "mangoes",
    "knife": "knives",
    "bookshelf": "bookshelves",
    "child": "children",
    "leaf": "leaves",
}


@dataclass(frozen=True, kw_only=True)
class Word:
    """One English word and its Chinese counterpart."""

    english: str
    chinese: str


@dataclass(frozen=True, kw_only=True)
class Noun(Word):
    """A countable noun."""

    measure: str
    """The measure word between a number and the noun in Chinese."""
    category: str

    @property
    def plural(self) -> str:
        """The English plural."""
        word = self.english
        if word in _IRREGULAR_PLURALS:
            return _IRREGULAR_PLURALS[word]
        if word.endswith(("s", "x", "ch", "sh")):
            return word + "es"
        if word.endswith("y") and word[-2] not in "aeiou":
            return word[:-1] + "ies"
        return word + "s"


@dataclass(frozen=True, kw_only=True)
class Adjective(Word):
    """A word that may stand before a noun."""

    @property
    def attribute(self) -> str:
        """The Chinese form before a noun: 大, 漂亮的."""
        return self.chinese if len(self.chinese) == 1 else self.chinese + "的"


def with_article(english: str) -> str:
    """The English noun after a or an."""
    vowel = english[0] in "aeiou" and not english.startswith("uni")
    return f"{'an' if vowel else 'a'} {english}"


def _pairs(table: str) -> Iterator[Word]:
    for entry in table.replace("\n", ", ").split(", "):
        if entry:
            english, _, chinese = entry.partition("=")
            yield Word(english=english, chinese=chinese)


def _nouns() -> Iterator[Noun]:
    for line in _NOUNS.strip().splitlines():
        category, measure, words = line.split(" | ")
        for word in _pairs(words):
            yield Noun(
                english=word.english, chinese=word.chinese, measure=measure, category=category
            )


NOUNS: tuple[Noun, ...] = tuple(_nouns())
ADJECTIVES: tuple[Adjective, ...] = tuple(
    Adjective(english=word.english, chinese=word.chinese) for word in _pairs(_ADJECTIVES)
)
VERBS: tuple[Word, ...] = tuple(_pairs(_VERBS))
SUBJECTS: tuple[Word, ...] = tuple(_pairs(_SUBJECTS))
OTHERS: tuple[Word, ...] = tuple(_pairs(_OTHERS))
WORDS: tuple[Word, ...] = (*NOUNS, *ADJECTIVES, *VERBS, *OTHERS)
"""Everything that can be asked for alone."""


def _opposites() -> Iterator[tuple[Adjective, Adjective]]:
    by_english = {adjective.english: adjective for adjective in ADJECTIVES}
    for entry in _OPPOSITES.strip().replace("\n", ", ").split(", "):
        first, _, second = entry.partition("-")
        yield by_english[first], by_english[second]


OPPOSITES: tuple[tuple[Adjective, Adjective], ...] = tuple(_opposites())
